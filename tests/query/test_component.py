"""A component of a store, and the paths that queries take in place of a store."""

from __future__ import annotations

from collections.abc import Callable

import npeff
import pytest
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError

HOSTILE = "<script>alert(1)</script>\x1b[31m"


def test_a_component_answers_as_its_store_does(run) -> None:
    store = ComponentStore.open(run.path)
    component = store.component(3)
    assert isinstance(component, npeff.Component)
    assert component.row == store.components_table().to_pylist()[3]
    assert component.top_examples(5, split="held_out") == store.top_examples(3, 5, "held_out")
    assert component.verification() == store.verification(3)
    assert component.layer_energy("layer") == store.layer_energy(3, "layer")
    assert component.similar(2) == store.similar_components(3, 2)
    with pytest.raises(QueryError, match="there is no component 12"):
        store.component(12)


def test_a_component_is_printed_as_a_text_outside_a_notebook(run, capsys: pytest.CaptureFixture[str]) -> None:
    component = ComponentStore.open(run.path).component(0)
    component.show()
    shown = capsys.readouterr().out
    assert shown == component.text() + "\n"
    lines = shown.splitlines()
    top = component.top_examples(8).to_pylist()
    assert lines[0] == "component 0"
    assert [line.split()[1] for line in lines[2:10]] == [row["id"] for row in top]
    assert lines[-1].startswith("KL ratio of fit examples: ")


def test_a_text_shows_control_characters_as_escape_sequences(make_run: Callable) -> None:
    shown = ComponentStore.open(make_run(n_components=4, hostile_text=HOSTILE).path).component(0).text()
    assert "\x1b" not in shown
    assert r"\x1b[31m" in shown


def test_a_store_is_opened_from_everything_that_names_a_run(run) -> None:
    opened = ComponentStore.open(str(run.path))
    assert ComponentStore.of(opened) is opened
    assert ComponentStore.of(str(run.path)).run_dir == ComponentStore.of(run.path).run_dir


def test_tables_become_data_frames_where_pandas_is_installed(run) -> None:
    pytest.importorskip("pandas")
    store = ComponentStore.open(run.path)
    frame = store.component(3).top_examples(4).to_pandas()
    assert frame["rank"].tolist() == [0, 1, 2, 3]
    assert len(store.components_table().to_pandas()) == 12
