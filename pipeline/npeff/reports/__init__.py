"""The report, which is one HTML page, and the live view."""
