r"""What reaches a terminal: texts of the data without control characters and without markup."""

from __future__ import annotations

import csv
import io
import re
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import in_process
import pyarrow as pa
import pytest
from npeff.cli import job_commands, main
from npeff.cli.layout import rows_table
from npeff.cli.output import OutputFormat, say, write_answer
from npeff.errors import printable
from npeff.runs.progress import LogProgress, TerminalProgress
from rich.console import Console
from synthetic_run import write_run

BAD = "\x1b]0;title\x07\x1b[2J\x9b31m\r\x00\x7f\u202e\u2066\u2028[red]:warning:[/]"
SHOWN = r"\x1b]0;title\x07\x1b[2J\x9b31m\r\x00\x7f\u202e\u2066\u2028[red]:warning:[/]"
ACTS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Terminal(io.StringIO):
    """A terminal, as far as programs ask."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = io.BytesIO()

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "digits"
    write_run(path, n_components=3, hostile_text=BAD, text_instead_of_images=True)
    return path


@pytest.mark.parametrize("text", ["a b", "é 数 🙂 ±", "family 👨\u200d👩", "back\\slash"])
def test_a_text_without_control_characters_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_control_characters_are_shown_as_escape_sequences() -> None:
    assert printable(BAD) == SHOWN
    assert printable("a\nb\tc\ud800") == r"a\nb\tc\ud800"
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


@pytest.mark.parametrize(
    "words",
    [
        ("query", "RUN", "top", "-c", "0", "-n", "3"),
        ("query", "RUN", "neighbours", "-e", "40", "-n", "3"),
        ("query", "RUN", "energy", "-c", "0"),
        ("query", "RUN", "sql", 'select name, 1 as "BAD" from classes'),
        ("query", "RUN", "example", "-e", "BAD"),
        ("query", "RUN", "top", "-c", "0", "--where", '"BAD" = 1'),
        ("query", "RUN", "sql", "select error('BAD')"),
        ("query", "BAD", "components"),
        ("query", "RUN", "BAD"),
        ("status", "BAD"),
        ("check", "BAD"),
        ("run", "BAD"),
        ("report", "RUN", "--factorization", "BAD"),
        ("rm", "BAD", "--factorization", "BAD"),
        ("submit", "BAD"),
        ("estimate", "BAD.yaml"),
        ("import", "BAD", "BAD"),
    ],
    ids=lambda words: " ".join(words).replace("BAD", "bad"),
)
def test_no_command_prints_control_characters_of_its_data_or_arguments(
    hostile_run: Path, capfd: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    bad = BAD.replace("\x00", "").replace("/", "")  # which the operating system does not take
    in_process.command(*(str(hostile_run) if word == "RUN" else word.replace("BAD", bad) for word in words))
    out, err = capfd.readouterr()
    assert out + err
    assert not ACTS.search(out + err)


def test_tables_show_markup_and_control_characters_as_text() -> None:
    stream = io.StringIO()
    Console(file=stream, width=200).print(rows_table([BAD], [["[/]"], [BAD]]))
    assert stream.getvalue().count(SHOWN) == 2
    assert "[/]" in stream.getvalue()
    assert not ACTS.search(stream.getvalue())


@pytest.mark.parametrize(
    "kind", [OutputFormat.CSV, OutputFormat.SPREADSHEET, OutputFormat.JSON, OutputFormat.TABLE, OutputFormat.EXPANDED]
)
def test_a_result_on_a_terminal_has_no_control_characters(kind: OutputFormat) -> None:
    terminal = Terminal()
    with redirect_stdout(terminal):
        write_answer(pa.table({"a": [BAD], BAD: [1]}), kind, None)
    text = terminal.getvalue() + terminal.buffer.getvalue().decode()
    assert "title" in text
    assert not ACTS.search(text.replace("\x1b[1m", "").replace("\x1b[0m", ""))


def test_progress_lines_and_logs_have_no_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    for display in (LogProgress(), TerminalProgress(Console(file=stream, width=200))):
        display.say(BAD)
        with display.stage("fishers", 2, "shards") as tick:
            tick(2, BAD)
    say(BAD)
    job_commands._print_log("one\r\ntwo\rthree \x1b[31m\n")
    text = stream.getvalue() + capfd.readouterr().out
    assert text.count(SHOWN) >= 4
    assert "one\ntwo\nthree \\x1b[31m\n" in text
    assert not ACTS.search(text)


def test_an_error_and_the_log_of_a_defect_have_no_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit):
        main._fail(f"bad {BAD}")
    main._logged(ValueError(BAD))
    (log,) = tmp_path.iterdir()
    shown = capfd.readouterr().err + log.read_text()
    assert shown.count(r"\x1b]0;title") == 2
    assert not ACTS.search(shown)


FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "－1")


def test_a_spreadsheet_does_not_evaluate_texts(tmp_path: Path) -> None:
    texts = [*FORMULAS, "a=1", "", None, "'=1"]
    table = pa.table({"=text": texts, "number": [-1.5] * len(texts), "words": pa.array(texts).dictionary_encode()})
    for kind in (OutputFormat.CSV, OutputFormat.SPREADSHEET):
        write_answer(table, kind, tmp_path / f"{kind}.csv")
    with (tmp_path / "csv.csv").open(newline="") as file:
        names, *rows = csv.reader(file)
    assert names[0] == "=text"
    assert [row[0] for row in rows] == [text or "" for text in texts]
    with (tmp_path / "spreadsheet.csv").open(newline="") as file:
        names, *rows = csv.reader(file)
    expected = [*(f"'{text}" for text in FORMULAS), "a=1", "", "", "'=1"]
    assert names == ["'=text", "number", "words"]
    assert [row[0] for row in rows] == [row[2] for row in rows] == expected
    assert {row[1] for row in rows} == {"-1.5"}
