"""Commands of docs/cluster.md and of the README's section: their options exist, and so do the files they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from pipeline.cli import app

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8").partition("## On a cluster")[2]


def commands(tool: str) -> list[list[str]]:
    """The words of every command of a tool, without its name."""
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE + README, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").replace(" && ", "\n").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [found[1:] for found in words if found and found[0] == tool]


def check(group: click.Command, words: list[str]) -> None:
    """Raises where a command or an option does not exist, or a value is refused; runs nothing."""
    context = click.Context(group)
    while isinstance(group, click.Group) or hasattr(group, "commands"):
        command = group.get_command(context, words[0])  # type: ignore[union-attr]
        assert command is not None, f"no command {words[0]}"
        group, words = command, words[1:]
    group.make_context(group.name, list(words), resilient_parsing=False)


@pytest.mark.parametrize("words", commands("npeff"), ids=" ".join)
def test_npeff_takes_the_command(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    (tmp_path / "my_package").mkdir()
    monkeypatch.chdir(tmp_path)
    check(typer.main.get_command(app), words)


@pytest.mark.parametrize("words", commands("ray"), ids=" ".join)
def test_ray_takes_the_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.scripts.scripts import cli

    monkeypatch.chdir(ROOT)
    check(cli, words)


def test_all_are_found() -> None:
    assert len(commands("npeff")) >= 12
    assert len(commands("ray")) >= 9
    assert len(commands("kubectl")) == 4


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"\b(?:jobs|tests)/[\w/-]+\.(?:yaml|py)|\bcluster\.yaml|jobs/Dockerfile", GUIDE + README))
    assert {"cluster.yaml", "jobs/rayjob.yaml", "jobs/Dockerfile", "jobs/sst2-on-gpus.yaml"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []
    image = re.findall(r"registry\.example\.com/\S+:\S+", GUIDE)
    assert all(name in (ROOT / "jobs/rayjob.yaml").read_text() for name in image)


def test_what_kubernetes_is_given_is_what_the_manifest_asks_for() -> None:
    manifest = (ROOT / "jobs/rayjob.yaml").read_text()
    made = [words[2] for words in commands("kubectl") if words[:2] == ["create", "configmap"]]
    assert made == ["npeff-run-file", "npeff-run"]
    assert all(re.search(rf"name: {name}\b", manifest) for name in made)
