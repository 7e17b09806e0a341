"""The sections of `tests/benchmarks/fishers.py`."""
