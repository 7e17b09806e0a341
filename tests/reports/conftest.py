"""A finished run of synthetic results, to ask and to report."""

from chromium import browser
from synthetic_run import informed_run, make_run, run, written_run

__all__ = ["browser", "informed_run", "make_run", "run", "written_run"]
