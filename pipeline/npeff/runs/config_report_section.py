"""The section of a run file for the report."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from npeff.runs.config_sections import Count, Section
from npeff.variables import resolved


class ReportConfig(Section):
    top_examples: Count = 12
    """Number of top examples in a component's card."""
    beside: Annotated[str | None, Field(min_length=1)] = None
    """Directory of another run. The report then has a table with the groups of inputs of both runs, over the examples
    that both explain."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the functions that write or serve the report."""
        beside = None if self.beside is None else resolved(self.beside, "report.beside")
        return {"top_examples": self.top_examples, "beside": beside}
