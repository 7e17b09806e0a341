"""One run: its configuration, directory, lock and records, and what a stage is."""
