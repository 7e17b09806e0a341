"""The sections of `tests/benchmarks/inputs.py`."""
