"""Single fits of a factorization, for `select` and for the stability of components."""
