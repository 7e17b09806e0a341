"""Stage `transform`: coefficients of new examples for the components of another run."""
