"""One component of a run: its number, its row, its examples and its verification, and its card in a notebook."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from npeff.errors import printable
from npeff.views import html_of, in_notebook, show_in_notebook

if TYPE_CHECKING:
    from npeff.query.components import ComponentStore
    from npeff.query.evidence import By

_EXAMPLES_OF_TEXT = 8
_SNIPPET = 60


@dataclass(frozen=True)
class Component:
    """A component of a run, which `ComponentStore.component` returns. A notebook shows it as its card of the report.

    Attributes:
        store: The store of the run.
        number: The number of the component.

    Examples:
        >>> from npeff import ComponentStore
        >>> component = ComponentStore.open("runs/digits").component(3)
        >>> component
        Component(3)
        >>> component.top_examples(n=2)["rank"].to_pylist()
        [0, 1]
        >>> component.row["component"], component.row["n_active"] > 0
        (3, True)
        >>> component.text().splitlines()[0]
        'component 3'
    """

    store: ComponentStore = field(repr=False)
    number: int

    def __repr__(self) -> str:
        return f"Component({self.number})"

    @cached_property
    def row(self) -> dict[str, Any]:
        """The row of the component in `ComponentStore.components_table`: column to value."""
        found = self.store.components_table().filter(pc.field("component") == self.number)
        row: dict[str, Any] = found.to_pylist()[0]
        return row

    def top_examples(
        self, n: int = 20, split: str | None = None, where: str | None = None, by: By = "coefficient"
    ) -> pa.Table:
        """Return the examples with the largest coefficients; see `ComponentStore.top_examples`."""
        return self.store.top_examples(self.number, n, split, where, by)

    def verification(self) -> pa.Table:
        """Return the rows of the table `verification`; no rows if the component is not verified."""
        return self.store.verification(self.number)

    def layer_energy(self, by: str = "parameter") -> pa.Table:
        """Return the fraction of the direction in each parameter or layer; see `ComponentStore.layer_energy`."""
        return self.store.layer_energy(self.number, by)

    def similar(self, n: int = 10) -> pa.Table:
        """Return the most similar components; see `ComponentStore.similar_components`."""
        return self.store.similar_components(self.number, n)

    def show(self) -> None:
        """Show the card of the component in a notebook; elsewhere, print it as text.

        Raises:
            QueryError: A table of the run is missing or damaged.
        """
        if in_notebook():
            show_in_notebook(self)
        else:
            print(self.text())

    def text(self) -> str:
        """Return the card as text: the examples with the largest coefficients, and the result of the verification."""
        row = self.row
        lines = [f"component {self.number}", f"{row['n_active']} of the fitted examples have it"]
        for example in self.top_examples(_EXAMPLES_OF_TEXT).to_pylist():
            classes = [example.get("label_name"), example.get("prediction_name")]
            named = " → ".join(dict.fromkeys(str(name) for name in classes if name is not None))
            facts = [f"{example['coefficient']:.4g}", str(example["id"]), named, _snippet(example.get("text"))]
            lines.append("  " + "  ".join(filter(None, facts)))
        for split in ("held_out", "fit"):
            ratio, control = (row.get(f"{name}_{split}") for name in ("kl_ratio_matched", "best_control"))
            if ratio is not None:
                beside = f", best control {control:.4g}" if control is not None else ""
                lines.append(f"KL ratio of {split.replace('_', '-')} examples: {ratio:.4g}{beside}")
        return "\n".join(map(printable, lines))

    def _repr_html_(self) -> str:
        return html_of(self)


def _snippet(text: str | None) -> str:
    shown = " / ".join((text or "").split("\n"))
    return shown if len(shown) <= _SNIPPET else shown[: _SNIPPET - 1] + "…"
