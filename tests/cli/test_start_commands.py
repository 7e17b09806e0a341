"""`npeff validate`: a run file is checked without the model; other commands do the same before they start."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from npeff.cli.main import main
from npeff.runs import yaml_text
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.stages.validation import validate

RUN = """
run_dir: {folder}/run
task:
  name: huggingface-causal-lm
  options: {{model: {folder}/model, data: {folder}/data.csv, text_column: text, {option}}}
factorization: {{n_components: 3}}
fishers: {fishers}
"""


@pytest.fixture
def called(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and standard error of a command."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        return int(ended.value.code or 0), *capfd.readouterr()

    return call


def run_file(folder: Path, fishers: str = "{labels: sampled, rank: 4}", option: str = "limit: 3") -> Path:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(
        '{"architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 96}'
    )
    (folder / "model" / "model.safetensors").touch()
    (folder / "data.csv").write_text("text\na b c\n")
    path = folder / "run.yaml"
    path.write_text(RUN.format(folder=folder, fishers=fishers, option=option))
    return path


def test_what_is_checked_is_shown(tmp_path: Path, called: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = called("validate", run_file(tmp_path))
    assert code == 0
    for text in ("is valid", "huggingface-causal-lm, 4 options", "GPT2LMHeadModel", "columns text"):
        assert text in " ".join(out.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["validate", "run", "fishers", "estimate"])
def test_a_mistake_is_found_before_anything_is_written(
    tmp_path: Path, called: Callable[..., tuple[int, str, str]], command: str
) -> None:
    code, _, err = called(command, run_file(tmp_path, option="limits: 3"))
    assert code == 2
    assert "task.options.limits (did you mean 'limit'?)" in err
    assert "\n" not in err.strip()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fishers", ["{labels: exact}", "{labels: truncated, rank: 3}"])
def test_exact_labels_of_a_vocabulary_are_refused_with_the_keys_to_change(tmp_path: Path, fishers: str) -> None:
    with pytest.raises(ConfigError, match=r"has 50,257 tokens: set fishers\.labels: sampled and fishers\.rank: 4"):
        validate(RunConfig.from_yaml(run_file(tmp_path, fishers)))
    validate(RunConfig.from_yaml(run_file(tmp_path, "{labels: empirical}")))


def test_a_missing_file_of_another_section(tmp_path: Path) -> None:
    config = RunConfig.from_yaml(run_file(tmp_path)).with_step(towards=f"{tmp_path}/none.parquet")
    with pytest.raises(ConfigError, match=r"step\.towards: there is no file .*none\.parquet"):
        validate(config)
    validate(config, files=False)


def test_a_cluster_has_other_files(tmp_path: Path) -> None:
    config = RunConfig.from_yaml(run_file(tmp_path))
    (tmp_path / "data.csv").unlink()
    assert validate(config, files=False) == {"task": "huggingface-causal-lm: options only checked"}


def write_empty_tensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write a safetensors file of zeros in float32 that takes no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def test_init_writes_a_run_file_that_is_valid(
    tmp_path: Path, called: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file(tmp_path).unlink()
    write_empty_tensors(
        tmp_path / "model" / "model.safetensors",
        {"lm.wte.weight": [50257, 64], "lm.mlp.weight": [2**14, 2**13]},
    )
    (tmp_path / "data.csv").write_text("id,text\n" + "".join(f"{row},a b c\n" for row in range(3000)))
    monkeypatch.chdir(tmp_path)
    code, out, _ = called("init", "--model", "./model", "--data", "data.csv", "--output", "lm.yaml")
    assert code == 0
    assert out.splitlines()[-1] == "next: npeff estimate lm.yaml; npeff run lm.yaml"
    config = RunConfig.from_yaml("lm.yaml")
    assert config.task.options | {"id_column": "id", "limit": 2000, "max_length": 96} == config.task.options
    assert (config.run_dir, config.fishers.labels, config.fishers.rank) == ("runs/lm", "sampled", 16)
    assert (config.task.options["examples"], config.task.options["positions_per_row"]) == ("positions", 1)
    assert config.parameters.exclude == ("*wte*",)
    assert config.lift.dtype == "float16", "32 directions of 128 Mi parameters in float32 take 16 GiB"
    text = Path("lm.yaml").read_text()
    assert "limit: 2000  # of 3,000 rows, for a first run" in text
    assert "# directions of 8 GiB on disk instead of 16" in text
    code, _, err = called("init", "--model", "./model", "--data", "data.csv", "--output", "lm.yaml")
    assert code == 2
    assert "lm.yaml exists: give another --output, or --force to replace it" in err
    assert Path("lm.yaml").read_text() == text


@pytest.mark.parametrize("text", ["a b c", '"a ""b""\n\nc, d\ne"'])
@pytest.mark.parametrize(("n_rows", "per_row", "components"), [(1, 8, 4), (150, 6, 22), (400, 2, 20), (5000, 1, 32)])
def test_init_draws_more_tokens_of_few_texts(
    tmp_path: Path, called: Callable[..., tuple[int, str, str]], n_rows: int, per_row: int, components: int, text: str
) -> None:
    run_file(tmp_path)
    config = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 300, "n_positions": 96}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    write_empty_tensors(tmp_path / "model" / "model.safetensors", {"lm.mlp.weight": [2, 2]})
    (tmp_path / "data.csv").write_text("text\n" + n_rows * f"{text}\n")
    file = tmp_path / "lm.yaml"
    code, _, err = called("init", "--model", tmp_path / "model", "--data", tmp_path / "data.csv", "--output", file)
    assert (code, err) == (0, "")
    made = RunConfig.from_yaml(file)
    assert made.task.options["positions_per_row"] == per_row
    assert made.factorization.n_components == components
    assert (made.fishers.labels, made.fishers.rank) == ("truncated", 8)
    validate(made)


def test_the_name_of_a_column_is_never_a_key_of_the_run_file(
    tmp_path: Path, called: Callable[..., tuple[int, str, str]]
) -> None:
    run_file(tmp_path).unlink()
    write_empty_tensors(tmp_path / "model" / "model.safetensors", {"lm.wte.weight": [2, 2]})
    (tmp_path / "data.csv").write_text('"x\nseed: 7\ny",text\n1,a b c\n')
    files = ("--model", tmp_path / "model", "--data", tmp_path / "data.csv", "--output", tmp_path / "lm.yaml")
    code, _, err = called("init", *files)
    assert (code, err) == (0, "")
    assert r"# x\nseed: 7\ny, text" in (tmp_path / "lm.yaml").read_text()
    assert RunConfig.from_yaml(tmp_path / "lm.yaml").seed == 0


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"])
def test_init_refuses_damaged_weights_in_one_line(
    tmp_path: Path, called: Callable[..., tuple[int, str, str]], content: bytes
) -> None:
    run_file(tmp_path).unlink()
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    files = ("--model", tmp_path / "model", "--data", tmp_path / "data.csv", "--output", tmp_path / "lm.yaml")
    code, _, err = called("init", *files)
    assert code == 2
    assert f"cannot read {tmp_path}/model/model.safetensors: " in err
    assert err.strip().endswith(": save the model again")
    assert "\n" not in err.strip()
    assert not (tmp_path / "lm.yaml").exists()


@pytest.mark.parametrize(
    "value", ["plain", "a b", "true", "1", "a: b", "[x", "é", "- a", "", "null", "a #b", "1e5", " a", "a\nb"]
)
def test_values_of_the_run_file_are_those_that_were_meant(value: str) -> None:
    text = f"key: {yaml_text.flow(value)}\nkeys: {yaml_text.flow([value, 'b'])}"
    assert text.count("\n") == 1
    assert yaml_text.parse(text.encode()) == {
        "key": value,
        "keys": [value, "b"],
    }
