"""The examples in the docstrings of the public classes give the output that the docstrings show."""

from __future__ import annotations

import doctest
from pathlib import Path

import npeff
import pytest
from npeff.perception.difference_scaling import DifferenceScaling
from npeff.query.component import Component
from npeff.query.components import ComponentStore
from synthetic_run import write_run


@pytest.mark.parametrize("documented", [npeff.NPEFF, npeff.DiagonalNPEFF, ComponentStore, Component, DifferenceScaling])
def test_docstring_examples(documented: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs" / "digits")  # the run that the examples open
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(exclude_empty=True).find(documented, documented.__name__, globs={})
    assert any(test.name == documented.__name__ and test.examples for test in found), "the class has no example"
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in found:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
