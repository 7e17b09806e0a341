"""``npeff scale``: the library's estimates for every observer of a CSV file, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from in_process import command, refused
from npeff.perception.difference_scaling import DifferenceScaling, answer_probability, triplets

SCALES = {"ann": np.linspace(0, 1, 6) ** 2, "bob": np.linspace(0, 1, 6) ** 0.5}


def answers(name: str) -> np.ndarray:
    shown = np.repeat(triplets(6), 12, axis=0)
    drawn = np.random.default_rng(len(name)).random(len(shown)) < answer_probability(SCALES[name], 0.2, shown)
    return np.column_stack([shown, drawn]).astype(int)


def test_each_observer_has_the_scale_of_the_library(tmp_path: Path) -> None:
    lines = [",".join(map(str, (*row, name))) for name in SCALES for row in answers(name).tolist()]
    (tmp_path / "answers.csv").write_text("\n".join(["i,j,k,response,observer", *reversed(lines)]))
    file = tmp_path / "scales.json"
    options = ("--confidence-level", "0.95", "--draws", "200", "--output", file)
    assert command("scale", "--responses", tmp_path / "answers.csv", *options) == 0
    rows = json.loads(file.read_text())
    for name in SCALES:
        own = [row for row in rows if row["observer"] == name]
        fitted = DifferenceScaling().fit(answers(name))
        found = fitted.intervals(0.95, n_draws=200)
        assert [row["level"] for row in own] == list(range(6))
        np.testing.assert_allclose([row["psi"] for row in own], fitted.psi_, rtol=1e-12)
        np.testing.assert_allclose([row["low"] for row in own], found.low_n, rtol=1e-12)
        np.testing.assert_allclose([row["high"] for row in own], found.high_n, rtol=1e-12)
        np.testing.assert_allclose([row["sigma"] for row in own], fitted.sigma_, rtol=1e-12)
        assert {row["n_trials"] for row in own} == {len(answers(name))}
        assert {row["n_draws"] for row in own} == {200 - found.n_left_out}


def test_without_observers_there_is_one_scale(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [",".join(map(str, row)) for row in answers("ann").tolist()]
    (tmp_path / "answers.csv").write_text("\ufeff" + "\n".join(["i,j,k,response", *lines]), encoding="utf-8")
    assert command("scale", "--responses", tmp_path / "answers.csv", "--draws", "100", "--format", "csv") == 0
    assert len(capfd.readouterr().out.splitlines()) == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no column 'i': its first line must name the columns i, j, k and response"),
        ("i,j,k\n0,1,2\n", "has no column 'response'"),
        ("i,j,k,response\n", "has no answers"),
        ("i,j,k,response\n0,1,2,1\n2,1,3,0\n", "line 3 is (2, 1, 3, 0): it must be levels i < j < k"),
        ("i,j,k,response\n0,1,2,yes\n", "line 2 is (0, 1, 2, yes)"),
        ("i,j,k,response\n0,1,2,1,0\n", "line 2 is (0, 1, 2, 1): it must be levels i < j < k"),
        ("i,j,k,response\n0,1\n", "line 2 is (0, 1, ,)"),
        (f"i,j,k,response\n0,1,{'9' * 5000},1\n", "line 2 is (0, 1, 999"),
        ("i,j,k,response\n0,1,999999999999999,1\n", "level 2 is never shown"),
        ("i,j,k,response,observer\n0,1,2,1,ann\n", "observer 'ann': "),
        ('i,j,k,response\n"0,1,2,1\n', "cannot read"),
        ("i,j,k,response\n0,1,2,\x00\n", "line 2"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(
    text: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "answers.csv").write_text(text)
    line = refused(capfd, "scale", "--responses", tmp_path / "answers.csv")
    assert said in line
    assert len(line) < 600


def test_a_file_that_is_not_there_or_is_no_text_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "cannot read" in refused(capfd, "scale", "--responses", tmp_path / "absent.csv")
    (tmp_path / "bytes.csv").write_bytes(b"i,j,k,response\n\xff\xfe\n")
    assert "cannot read" in refused(capfd, "scale", "--responses", tmp_path / "bytes.csv")
