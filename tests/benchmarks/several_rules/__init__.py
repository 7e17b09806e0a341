"""Parts of ground_truth.py: examples on which several known rules are active, and what the methods find of them."""
