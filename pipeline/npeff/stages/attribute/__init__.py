"""Stage `attribute`: the tokens at which a direction acts."""
