"""Stage `select`: how many components the Fishers support."""
