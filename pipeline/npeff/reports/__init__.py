"""The report, one HTML page, and the live view."""
