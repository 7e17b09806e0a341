"""The parts of the benchmark of training."""
