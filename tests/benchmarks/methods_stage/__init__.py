"""Parts of methods.py: the runs, the model with permuted weights, and the statistics over components."""
