"""Stage `lift`: components to directions in parameter space."""
