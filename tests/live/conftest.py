"""A finished run of synthetic results, to ask and to report."""

from synthetic_run import informed_run, make_run, run, written_run

__all__ = ["informed_run", "make_run", "run", "written_run"]
