"""The parts of the benchmark of natural gradients."""
