"""Stage `verify`: the model moved along each direction, beside controls."""
