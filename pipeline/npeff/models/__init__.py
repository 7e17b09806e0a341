"""The model and the examples of a run, as a worker loads them."""
