"""Names and notes of components: what is kept, what is refused, and when they no longer describe the components."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from npeff.query.tables import StoredRun
from npeff.storage.errors import StoreError
from npeff.store.annotations import LONGEST_NAME, Annotation, read_annotations, verify_annotations, write_annotations
from npeff.store.component_store import write_factorization

K, D = 4, 6


@pytest.fixture
def stored(tmp_path: Path) -> StoredRun:
    run = StoredRun(tmp_path, "default")
    write_components(run, seed=0)
    return run


def write_components(run: StoredRun, seed: int) -> None:
    components = np.random.default_rng(seed).standard_normal((K, D))
    write_factorization(run.factorization, components, np.ones((3, K), np.float32), {})


def test_a_change_keeps_what_it_does_not_name_and_an_empty_text_deletes(stored: StoredRun) -> None:
    assert read_annotations(stored).of_component == {}
    write_annotations(stored, {3: Annotation("negation", "a note"), 1: Annotation("numbers")})
    write_annotations(stored, {3: Annotation(note="another note")})
    found = write_annotations(stored, {1: Annotation(name="")})
    assert found.of_component == {3: Annotation("negation", "another note")}
    assert read_annotations(stored) == found
    assert (found.name(3), found.name(1), found.note(1)) == ("negation", None, None)


def test_annotations_of_other_components_are_not_shown_and_those_of_the_same_are(stored: StoredRun) -> None:
    write_annotations(stored, {3: Annotation("negation")})
    write_components(stored, seed=1)
    found = read_annotations(stored)
    assert found.outdated
    assert found.of_component == {}
    write_components(stored, seed=0)
    assert read_annotations(stored).name(3) == "negation"
    write_components(stored, seed=1)
    write_annotations(stored, {0: Annotation("questions")})
    assert read_annotations(stored).of_component == {0: Annotation("questions")}
    assert not read_annotations(stored).outdated


def test_a_name_is_one_line_without_control_characters(stored: StoredRun) -> None:
    found = write_annotations(stored, {0: Annotation("  a\tname \x1b[31m of\u202e two\nlines\ud800 ")})
    assert found.name(0) == "a name [31m of two lines"
    assert read_annotations(stored) == found


def test_texts_that_are_too_long_and_unknown_components_change_nothing(stored: StoredRun) -> None:
    write_annotations(stored, {0: Annotation("first")})
    before = stored.annotations.read_bytes()
    with pytest.raises(StoreError, match="the name of component 1 has 201 characters: write at most 200"):
        write_annotations(stored, {0: Annotation("other"), 1: Annotation("x" * (LONGEST_NAME + 1))})
    for component in (-1, K):
        with pytest.raises(StoreError, match=f"there is no component {component}: choose one of 0 to 3"):
            write_annotations(stored, {0: Annotation("other"), component: Annotation("x")})
    assert stored.annotations.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: text.replace("first", "other"),
        lambda text: json.dumps({"components": "x", "annotations": {"0": {"title": "x"}}}),
        lambda text: json.dumps([1]),
    ],
    ids=["cut", "changed", "other keys", "a list"],
)
def test_a_damaged_file_is_one_line_with_the_remedy(stored: StoredRun, change) -> None:
    write_annotations(stored, {0: Annotation("first")})
    verify_annotations(stored.annotations)
    stored.annotations.write_text(change(stored.annotations.read_text()))
    for read in (lambda: verify_annotations(stored.annotations), lambda: read_annotations(stored)):
        with pytest.raises(StoreError, match="is damaged: restore it from a copy or delete it"):
            read()


def test_writers_at_the_same_time_lose_no_names(stored: StoredRun) -> None:
    with ThreadPoolExecutor(K) as writers:
        list(
            writers.map(
                lambda component: write_annotations(stored, {component: Annotation(f"name {component}")}), range(K)
            )
        )
    assert read_annotations(stored).of_component == {k: Annotation(f"name {k}") for k in range(K)}


def test_components_come_from_the_record_if_it_has_them(stored: StoredRun) -> None:
    record = stored.record_file("factorize")
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"checksums": {"components": "abc"}, "n_components": 2}))
    write_annotations(stored, {1: Annotation("second")})
    with pytest.raises(StoreError, match="choose one of 0 to 1"):
        write_annotations(stored, {2: Annotation("third")})
    record.unlink()
    assert read_annotations(stored).outdated
