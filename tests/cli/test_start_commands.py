"""`npeff validate`: a run file is checked without the model; other commands do the same before they start."""

from __future__ import annotations

import json
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
from npeff.stages.new_run_file import _value
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


def test_init_writes_a_run_file_that_is_valid(
    tmp_path: Path, called: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file(tmp_path).unlink()
    header = {"lm.wte.weight": {"shape": [50257, 64]}, "lm.mlp.weight": {"shape": [2**14, 2**13]}}
    text = json.dumps(header).encode()
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "data.csv").write_text("id,text\n" + "".join(f"{row},a b c\n" for row in range(3000)))
    monkeypatch.chdir(tmp_path)
    code, out, _ = called("init", "--model", "./model", "--data", "data.csv", "--output", "lm.yaml")
    assert code == 0
    assert out.splitlines()[-1] == "next: npeff estimate lm.yaml; npeff run lm.yaml"
    config = RunConfig.from_yaml("lm.yaml")
    assert config.task.options | {"id_column": "id", "limit": 2000, "max_length": 96} == config.task.options
    assert (config.run_dir, config.fishers.labels, config.fishers.rank) == ("runs/lm", "sampled", 4)
    assert config.parameters.exclude == ("*wte*",)
    assert config.lift.dtype == "float16", "32 directions of 128 Mi parameters in float32 take 16 GiB"
    text = Path("lm.yaml").read_text()
    assert "limit: 2000  # of 3,000 rows, for a first run" in text
    assert "# directions of 8 GiB on disk instead of 16" in text
    code, _, err = called("init", "--model", "./model", "--data", "data.csv", "--output", "lm.yaml")
    assert code == 2
    assert "lm.yaml exists: give another --output, or --force to replace it" in err
    assert Path("lm.yaml").read_text() == text


@pytest.mark.parametrize(
    "value", ["plain", "a b", "true", "1", "a: b", "[x", "é", "- a", "", "null", "a #b", "1e5", " a"]
)
def test_values_of_the_run_file_are_those_that_were_meant(value: str) -> None:
    assert yaml_text.parse(f"key: {_value(value)}\nkeys: {_value([value, 'b'])}".encode()) == {
        "key": value,
        "keys": [value, "b"],
    }
