"""The parts of the benchmark of estimators of a Fisher matrix."""
