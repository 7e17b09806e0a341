"""Atomic reads and writes of files and folders, on a local disk or an object store."""
