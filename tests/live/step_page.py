"""What the page of a step shows in a browser, and the same numbers computed from the stored direction in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import npeff
import torch
from chromium import Browser
from npeff.query.components import ComponentStore
from npeff.runs.directory import RunDirectory
from npeff.store.direction_store import DirectionStore
from npeff.tasks import load_task

READ = """[...document.querySelectorAll('#result section')].map((section) => ({
  classes: [...section.querySelectorAll('.mix tbody tr')].map((row) => [...row.cells].map((c) => c.textContent.trim())),
  examples: [...section.querySelectorAll('.plain tbody tr')].map((row) => [
    row.querySelector('a').textContent.trim(), ...[...row.querySelectorAll('td')].map((c) => c.textContent.trim())
  ]),
}))"""


class Group(NamedTuple):
    """The numbers of a group of examples; probabilities in percent."""

    classes: dict[str, tuple[float, float]]
    """The mean probability after the step, and its change, by the name of the class."""
    examples: dict[str, tuple[str, float, str, float, float]]
    """The predicted class and its probability before and after the step, and the KL, by the id of the example."""


def shown(browser: Browser) -> list[Group]:
    """What the page shows, for the top examples and for others."""
    found = []
    for section in browser.evaluate(READ):
        classes = {name: (_number(after), _number(change)) for name, _, after, change in section["classes"]}
        examples = {
            name: (before, _number(p), after, _number(q), _number(kl))
            for name, before, p, after, q, kl in section["examples"]
        }
        found.append(Group(classes, examples))
    return found


def computed(run: RunDirectory, component: int, eps: float, ids: list[str]) -> Group:
    """The same for examples of a run with one prediction each, after a step of `eps` steps of the verification."""
    task = load_task(run.config.task.name, run.config.task.options)
    model, examples = task.model(run.task_cache).double().eval(), task.examples(run.task_cache)
    numbers = [examples.table()["id"].to_pylist().index(name) for name in ids]
    rows = ComponentStore.open(run.path).verification(component).to_pylist()
    length = next(row["epsilon"] for row in rows if row["examples"] == "held_out" and row["sign"] * eps > 0)
    before = _log_p(task, model, examples.batch(numbers))
    for name, array in DirectionStore.open(run.directions).read(component).items():
        model.get_parameter(name).data += eps * length * torch.from_numpy(array).double()
    after = _log_p(task, model, examples.batch(numbers))
    names, p, q = examples.class_names, before.exp(), after.exp()
    kl = (q * (after - before)).sum(1)
    classes = {name: (100 * float(q[:, c].mean()), 100 * float((q - p)[:, c].mean())) for c, name in enumerate(names)}
    best = zip(ids, p.argmax(1).tolist(), q.argmax(1).tolist(), strict=True)
    rows_of = {
        name: (names[old], 100 * float(p[i, old]), names[new], 100 * float(q[i, new]), float(kl[i]))
        for i, (name, old, new) in enumerate(best)
    }
    return Group(classes, rows_of)


@torch.no_grad()
def _log_p(task: npeff.tasks.Task, model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return task.logits(model, batch).double().log_softmax(1)


def _number(text: str) -> float:
    return float(text.replace("−", "-").rstrip("%"))
