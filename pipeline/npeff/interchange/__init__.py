"""Files of the NPEFF reference implementation, into a run and out of it."""
