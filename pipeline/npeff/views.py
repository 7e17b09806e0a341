"""The HTML views that notebooks show for the public objects.

A view is named by a string ``"module:attribute"``, as the functions of the stages are. The objects are in rooms that
may not import the code that draws them, and this code is imported when a notebook shows the object.
"""

from __future__ import annotations

import importlib
import sys

_VIEWS = {
    "Component": "npeff.reports.notebook:component_html",
    "ComponentStore": "npeff.reports.notebook:store_html",
    "RunDirectory": "npeff.stages.status:status_html",
}
"""Class of an object, and the function ``(object) -> str`` that draws it."""


def html_of(shown: object) -> str:
    """Return the view of a public object as HTML. All texts of the data are escaped."""
    view = next(_VIEWS[each.__name__] for each in type(shown).__mro__ if each.__name__ in _VIEWS)
    module, _, attribute = view.partition(":")
    html: str = getattr(importlib.import_module(module), attribute)(shown)
    return html


def in_notebook() -> bool:
    """Return whether the code runs in a Jupyter kernel. IPython is not imported if nothing else has imported it."""
    if "IPython" not in sys.modules:
        return False
    from IPython.core.getipython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def show_in_notebook(shown: object) -> None:
    """Show an object as the output of the current cell of a notebook."""
    from IPython.display import display

    display(shown)  # type: ignore[no-untyped-call]  # it has no types
