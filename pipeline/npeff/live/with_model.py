"""The pages that need the model: an example of one's own, and a step with a slider."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np

from npeff.errors import NpeffError, without_values
from npeff.live.model_client import ModelProcess
from npeff.live.own_example import OwnExampleError, fields_of, options_for, written
from npeff.live.pages import Page, View
from npeff.live.queries import whole
from npeff.live.snapshot import Snapshot
from npeff.live.templates import page
from npeff.live.workspace import Workspace, pictured
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.reports.cards import Card
from npeff.reports.shifts import StepEffect, step_effect
from npeff.runs.directory import RunDirectory
from npeff.statistics.verdict import Verdict

LONGEST_STEP = 3.0
"""Largest step of the slider, in steps of the verification."""
_EXAMPLES, _SEED = 12, 0
_MOST_CLASSES = 2000
"""Largest number of classes in a menu."""


class ModelPages:
    """The pages of one run that need its model.

    Args:
        view: What is served.
        workspace: The other pages.
        key: The key that a form of this server contains.
    """

    def __init__(self, view: View, workspace: Workspace, key: str) -> None:
        self._view, self._workspace, self._key = view, workspace, key
        self.process = ModelProcess(view)

    def own_example(self, asked: Mapping[str, str]) -> Page:
        """Return the form for an example of one's own."""
        with self._workspace.now() as snapshot:
            return self._form(snapshot, {})

    def tried(self, given: Mapping[str, str | bytes]) -> Page:
        """Return the components of an example of one's own and the nearest examples, or the form with what is wrong.

        Args:
            given: Texts and image files by column.
        """
        config = RunDirectory.open(self._view.run_dir, self._view.factorization).config
        with self._workspace.now() as snapshot:
            classes = _classes(snapshot.store)
        with tempfile.TemporaryDirectory(prefix="npeff-") as folder:
            path = Path(folder) / "example.parquet"
            try:
                fields = fields_of(config.task.name, config.task.options, classes)
                written(fields, given, path)
                found = self.process.ask("example", options=options_for(config.task.options, fields, given, path))
            except NpeffError as error:
                # the table is not the user's
                problem = without_values(str(error)).replace(f"{path}: ", "").replace(str(path), "the example")
                with self._workspace.now() as snapshot:
                    return self._form(snapshot, given, HTTPStatus.BAD_REQUEST, problem)
        with self._workspace.now() as snapshot:
            store, weights_K = snapshot.store, np.array(found["coefficients"])
            order = [k for k in np.argsort(-weights_K, kind="stable").tolist() if weights_K[k] > 0]
            total, known = float(weights_K.sum()), store.annotations
            components = [
                {"component": k, "name": known.name(k), "coefficient": weights_K[k], "share": weights_K[k] / total}
                for k in order
            ]
            near = snapshot.nearest(weights_K, _EXAMPLES).to_pylist() if order else []
            return self._form(
                snapshot,
                given,
                found=found,
                summary=snapshot.summary,
                components=components,
                cards=snapshot.cards,
                neighbours=near,
                pictured=pictured(store, [row["example"] for row in near]),
            )

    def _form(
        self,
        snapshot: Snapshot,
        given: Mapping[str, str | bytes],
        status: int = HTTPStatus.OK,
        problem: str = "",
        **results: Any,
    ) -> Page:
        config = RunDirectory.open(self._view.run_dir, self._view.factorization).config
        fields = []
        try:
            fields = fields_of(config.task.name, config.task.options, _classes(snapshot.store))
        except OwnExampleError as error:
            problem = str(error)
        shown = {name: value for name, value in given.items() if isinstance(value, str)}
        return page(
            "try.html.j2", status, styled=True, view=self._view, key=self._key, fields=fields, given=shown,
            problem=problem, **({"found": None} | results)
        )  # fmt: skip

    def step(self, asked: dict[str, str]) -> Page:
        """Return the form of a step and, if ``eps`` is asked, what the step does to predictions."""
        eps = _number(asked["eps"]) if asked.get("eps") else None
        with self._workspace.now() as snapshot:
            cards = snapshot.cards
            number = whole(asked, "component", 0)
            if cards and number >= len(cards):
                raise QueryError(f"there is no component {number}: this run has {len(cards)} components")
            card = cards[number] if cards else None
            length = None if card is None or eps is None else _length(card, eps)
            groups = {} if card is None else _groups(snapshot, card)
            plan: dict[str, Any] = {
                "view": self._view,
                "cards": cards,
                "card": card,
                "run_dir": snapshot.store.run.argument,
            }
            plan |= {"longest": LONGEST_STEP, "verified": card is not None and bool(_lengths(card))}
            rows = _rows(snapshot.store, groups)
            ids = {example: str(row["id"]) for example, row in rows.items()}
            plan |= {"rows": rows, "pictured": pictured(snapshot.store, list(rows)), "sizes": groups}
            plan["verdict"] = None if card is None or eps is None else _verdict(card, eps)
            tokens = not snapshot.store.class_names()
            several = bool(card) and all(share.prediction is None for card in cards for share in card.mix)
        effects: dict[str, Any] = {}
        if card is not None and eps is not None and length is not None:
            found = self.process.ask("step", component=number, step=length, groups=groups)
            effects = {
                name: {"kl": of["kl"], "effect": _effect(of, ids, name, eps, several=several, tokens=tokens)}
                for name, of in found.items()
                if of["examples"]
            }
        return page("step.html.j2", styled=True, eps=eps, length=length, effects=effects, **plan)


def _number(text: str) -> float:
    try:
        eps = float(text)
    except ValueError:
        eps = math.nan
    if not abs(eps) <= LONGEST_STEP:
        raise QueryError(f"eps must be a number from {-LONGEST_STEP:g} to {LONGEST_STEP:g}")
    return eps


def _lengths(card: Card) -> dict[int, float]:
    """Return the length of the verification's step by its sign."""
    found: dict[int, float] = {}
    for verdict in card.verdicts:
        found.setdefault(verdict.sign, verdict.row["epsilon"])
    return found


def _length(card: Card, eps: float) -> float | None:
    """Return the length of a step, with its sign; None if the component is not verified."""
    lengths = _lengths(card)
    if not lengths:
        return None
    sign = 1 if eps >= 0 else -1
    return eps * lengths.get(sign, next(iter(lengths.values())))


def _groups(snapshot: Snapshot, card: Card) -> dict[str, list[int]]:
    """Return the top examples of a component and as many others of their split, drawn at random."""
    top = [example.example for example in (card.held_out or card.fit)[:_EXAMPLES]]
    if not top:
        return {}
    split = "held_out" if card.held_out else "fit"
    members = np.flatnonzero(snapshot.members(split))
    others = np.setdiff1d(members, [example.example for example in card.examples])
    drawn = np.random.default_rng([_SEED, card.component]).permutation(others)[:_EXAMPLES]
    return {"top": top, "other": sorted(drawn.tolist())}


def _verdict(card: Card, eps: float) -> Verdict | None:
    """Return the verification of a component on the split and with the sign of a step; None if there is none."""
    split, sign = "held_out" if card.held_out else "fit", 1 if eps >= 0 else -1
    return next((found for found in card.verdicts if (found.examples, found.sign) == (split, sign)), None)


def _rows(store: ComponentStore, groups: dict[str, list[int]]) -> dict[int, dict[str, Any]]:
    """Return the rows of the examples of all groups by their numbers."""
    examples = sorted({example for members in groups.values() for example in members})
    rows = store.describe_examples(examples).to_pylist() if examples else []
    return {row["example"]: row for row in rows}


def _classes(store: ComponentStore) -> list[str]:
    """Return the names to choose a label from; none if they do not tell all classes apart."""
    names = store.class_names()
    differ = len({name.lower() for name in names.values()}) == len(names)
    return [names[number] for number in sorted(names)] if differ and 1 < len(names) <= _MOST_CLASSES else []


def _effect(
    of: dict[str, Any], ids: dict[int, str], name: str, eps: float, *, several: bool, tokens: bool
) -> StepEffect:
    return step_effect(
        of["classes"],
        of["examples"],
        ids,
        examples_of=name,
        sign=1 if eps >= 0 else -1,
        informative=False,
        changed=of["changed"] or 0.0,
        several=several,
        tokens=tokens,
        most=_EXAMPLES,
    )
