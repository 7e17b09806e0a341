"""The templates of the live view, which use those of the report."""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import jinja2

from npeff.live.pages import HTML, Page
from npeff.reports.report import Links, environment

LINKS = Links(
    overview="/", component=lambda k: f"/component/{k}", example=lambda i: f"/example/{quote(str(i), safe='')}"
)
STYLE_SHEETS = ("report.css", "live.css")


@functools.cache
def templates() -> jinja2.Environment:
    """Return the templates, with links between pages in place of those inside the report."""
    found = environment().overlay(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader("npeff.live"), jinja2.PackageLoader("npeff.reports")])
    )
    found.globals = {**found.globals, "links": LINKS}
    return found


def page(template: str, status: int = HTTPStatus.OK, *, styled: bool = False, **variables: Any) -> Page:
    """Return a page of HTML."""
    content = templates().get_template(template).render(**variables).encode()
    return Page(status, HTML, content, styled=styled)


@functools.cache
def style() -> Page:
    """Return the style sheet of all pages but the report."""
    return _joined("text/css; charset=utf-8", *STYLE_SHEETS)


@functools.cache
def script() -> Page:
    """Return the script of all pages but the report."""
    return _joined("text/javascript; charset=utf-8", "live.js")


def _joined(kind: str, *names: str) -> Page:
    return Page(HTTPStatus.OK, kind, "".join(templates().get_template(name).render() for name in names).encode())
