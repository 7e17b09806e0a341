"""Import and export of the files of the NPEFF reference implementation."""
