"""Stage `factorize`: non-negative coefficients and components of the stored Fishers."""
