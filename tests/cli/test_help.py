"""Help texts on a terminal of 80 columns: complete, in the order of use, without types of Python."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from in_process import command
from npeff.cli.app import SECTIONS, app
from npeff.cli.query_commands import query_app
from typer.main import get_command

COMMANDS = list(get_command(app).commands)
QUERIES = list(get_command(query_app).commands)


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def help_of(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert command(*words, "--help") == 0
    return capfd.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["query"], *([name] for name in COMMANDS), *(["query", "no-such-run", name] for name in QUERIES)],
    ids=" ".join,
)  # fmt: skip
def test_a_help_text_is_whole_and_names_no_type_of_python(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    text = help_of(capfd, *words)
    assert text.startswith("Usage: npeff")
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in text.replace("[ARGS]...", "")
    assert "…" not in text
    assert not re.search(r"[<{]\w|\brange>|list\[|\[\[", text.replace('{"head"', ""))


def test_commands_are_listed_once_in_the_order_of_use(capfd: pytest.CaptureFixture[str]) -> None:
    text = help_of(capfd)
    expected = [name for names in SECTIONS.values() for name in names]
    assert Counter(expected) == Counter(COMMANDS)
    listed = re.findall(r"^  ([a-z]+) {2,}\S", text, re.MULTILINE)
    assert listed == expected
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Options", *SECTIONS]
    assert expected.index("estimate") < expected.index("run") < expected.index("fishers") < expected.index("factorize")
    assert expected.index("lift") < expected.index("verify") < expected.index("report") < expected.index("query")


def test_arguments_of_usage_lines_are_plain(capfd: pytest.CaptureFixture[str]) -> None:
    usage = {words: help_of(capfd, *words.split()).splitlines()[0] for words in ("run", "compare", "query R top")}
    assert usage == {
        "run": "Usage: npeff run [OPTIONS] RUN",
        "compare": "Usage: npeff compare [OPTIONS] RUN_DIR [OTHER_RUN_DIR]",
        "query R top": "Usage: npeff query RUN_DIR top [OPTIONS]",
    }


def test_a_usage_error_names_the_help_of_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("query", tmp_path, "top") == 2
    assert "(see: npeff query RUN_DIR top --help)" in capfd.readouterr().err
