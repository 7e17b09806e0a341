"""Parts of repair.py: the runs with their tuning examples, the methods with their trials, and the statistics."""
