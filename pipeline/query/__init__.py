"""Questions to a finished run and its report. Only reads (the report itself is the one file written)."""

from pipeline.query.components import ComponentStore
from pipeline.query.errors import QueryError
from pipeline.query.report import write_report
from pipeline.query.serve import serve
from pipeline.query.verdict import Scores, Verdict, scoreboard, verdicts

__all__ = ["ComponentStore", "QueryError", "Scores", "Verdict", "scoreboard", "serve", "verdicts", "write_report"]
