"""Compiles the templates of a query. The process from which those of the queries are copied imports this module, so
that none of them compiles the templates again, which takes longer than a query."""

from __future__ import annotations

from npeff.live.templates import templates

for _name in ("layout.html.j2", "query.html.j2", "macros.html.j2"):
    templates().get_template(_name)
