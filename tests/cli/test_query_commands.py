"""`npeff query`: every command's answer in every format, on standard output and in a file; mistakes are one line."""

from __future__ import annotations

import io
import json
import shlex
import signal
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from npeff.cli.main import main
from npeff.query.components import ComponentStore

COMMANDS = {
    "top -c 3 -n 4 --split fit --where 'label=2'": lambda store: store.top_examples(3, 4, "fit", "label=2"),
    "example -e 40": lambda store: store.example(40),
    "neighbours -e 40 -n 3 --where correct": lambda store: store.neighbours(40, 3, where="correct"),
    "similar -c 2 -n 2": lambda store: store.similar_components(2, 2),
    "enriched --where 'label=2' -n 5 --top 9": lambda store: store.enriched("label=2", top=9, n=5),
    "energy -c 1 --by layer": lambda store: store.layer_energy(1, by="layer"),
    "verification -c 1": lambda store: store.verification(1),
    "components": lambda store: store.components_table(),
    "sql 'select count(*) as n from examples'": lambda store: store.sql("select count(*) as n from examples"),
}


@pytest.fixture
def ask(run, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch):
    """Exit code, standard output and standard error of `npeff query`."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def asked(*arguments: object, path: Path = run.path) -> tuple[int, bytes, str]:
        with pytest.raises(SystemExit) as ended:
            main(["query", str(path), *map(str, arguments)])
        out, err = capfdbinary.readouterr()
        return int(ended.value.code or 0), out, err.decode()

    return asked


@pytest.mark.parametrize("command", COMMANDS)
def test_answers_are_those_of_the_store_in_every_format(ask, run, tmp_path: Path, command: str) -> None:
    expected = COMMANDS[command](ComponentStore.open(run.path))
    for ending in ("json", "csv", "parquet", "txt"):
        file = tmp_path / f"answer.{ending}"
        assert ask(*shlex.split(command), "--output", file) == (0, b"", "")
        chosen = "table" if ending == "txt" else ending
        code, out, _ = ask(*shlex.split(command), "--format", chosen)
        assert (code, out) == (0, file.read_bytes())
    assert json.loads((tmp_path / "answer.json").read_text()) == json.loads(json.dumps(expected.to_pylist()))
    assert pq.read_table(tmp_path / "answer.parquet").equals(expected)
    assert pa.csv.read_csv(io.BytesIO((tmp_path / "answer.csv").read_bytes())).column_names == expected.column_names
    assert expected.column_names[0] in (tmp_path / "answer.txt").read_text()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_that_cannot_be_written_is_one_line_and_a_former_one_is_kept(ask, run, tmp_path: Path) -> None:
    former = tmp_path / "answer.parquet"
    former.write_text("mine")
    for arguments, said in (
        (("components", "-o", tmp_path / "no" / "a.csv"), "cannot write"),
        (("components", "-o", tmp_path), "is a directory"),
        (("sql", "select interval 3 days", "-o", former), "the format parquet does not support this result"),
        (("top", "-c", 0, "--where", "labl = 2", "-o", former), "examples have no column 'labl': did you mean label"),
        (("energy", "-c", 0, "--by", "module"), "'module' is not one of 'parameter', 'layer'"),
        (("similar", "-c", 0, "--other", tmp_path), "is not a run directory"),
        (("similar", "-c", 0, "--other", run.path), "fishers.zarr does not exist"),
    ):
        code, out, err = ask(*arguments)
        assert (code, out) == (2, b"")
        assert err.startswith("npeff: error: ")
        assert err.count("\n") == 1
        assert said in err
    assert former.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1
