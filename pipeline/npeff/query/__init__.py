"""Read-only queries of a run."""
