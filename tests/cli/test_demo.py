"""``npeff demo``: the quickstart from the package."""

from __future__ import annotations

from pathlib import Path

import npeff
import pytest
from npeff.cli.demo_command import QUICKSTART
from npeff.cli.main import main

ROOT = Path(__file__).parents[2]


def test_the_package_and_the_checkout_have_the_same_quickstart() -> None:
    assert QUICKSTART.read_bytes() == (ROOT / "jobs" / "quickstart.yaml").read_bytes()


@pytest.mark.parametrize(("words", "folder"), [([], "runs/digits"), (["--run-dir", "elsewhere"], "elsewhere")])
def test_the_demo_runs_under_the_current_directory(
    words: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(opened: npeff.RunDirectory, progress: object) -> None:
        ran.append(opened.path)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(npeff, "run", run)
    with pytest.raises(SystemExit):
        main(["demo", *words])
    assert [path.resolve() for path in ran] == [tmp_path / folder]
