"""A run: its configuration, directory, lock and records, and the definition of a stage."""
