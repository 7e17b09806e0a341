"""Questions to a finished run. Only reads."""
