"""A finished run of synthetic results, to ask and to report."""

from synthetic_run import make_run, run, written_run

__all__ = ["make_run", "run", "written_run"]
