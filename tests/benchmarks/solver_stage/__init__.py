"""Parts of the benchmark `solver.py`."""
