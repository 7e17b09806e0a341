"""The report, which is one HTML page."""
