"""D-NPEFF: non-negative factorization of diagonals."""
