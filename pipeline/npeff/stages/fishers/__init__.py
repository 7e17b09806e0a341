"""Stage `fishers`: the low-rank Fisher of every example."""
