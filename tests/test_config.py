"""Run files: what is accepted, and that each mistake is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import ConfigError, RunConfig

MINIMAL = "run_dir: runs/x\ntask: {name: digits}\nfactorization: {n_components: 4}\n"


def read(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return RunConfig.from_yaml(path)


def test_only_three_keys_have_no_default(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL)
    assert config.fishers.sketch.dim == 4096
    assert config.factorization.n_components == 4


def test_the_resolved_configuration_reads_back_as_the_same(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL + "fishers: {sketch: {kind: identity}}\nexecutor: {workers: 3}\n")
    assert read(tmp_path, config.to_yaml()) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: {name: digits}\nfactorization: {n_components: 4}\n", "missing key 'run_dir'"),
        ("run_dir: x\ntask: {name: digits}\n", "missing key 'factorization'"),
        ("run_dir: x\ntask: {name: digits}\nfactorization: {}\n", "missing key 'factorization.n_components'"),
        (MINIMAL + "fisher: {}\n", "unknown key 'fisher' (did you mean 'fishers'?)"),
        (MINIMAL + "fishers: {shardsize: 3}\n", "unknown key 'fishers.shardsize' (did you mean 'shard_size'?)"),
        (MINIMAL + "fishers: {sketch: {kind: gaussian}}\n", "fishers.sketch.kind"),
        (MINIMAL + "fishers: {sketch: {kind: identity, dim: 3}}\n", "takes no dim"),
        (MINIMAL + "fishers: {shard_size: 0}\n", "fishers.shard_size: input should be greater than 0"),
        (MINIMAL + "seed: -1\n", "seed"),
        (MINIMAL + "executor: {kind: serial, workers: 2}\n", "the serial executor has one worker"),
        (MINIMAL + "verification: {target_kl: 0}\n", "verification.target_kl"),
        ("- a\n- b\n", "must hold a mapping"),
        ("run_dir: [", "not valid YAML"),
        ("", "must hold a mapping"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run file at"):
        RunConfig.from_yaml(tmp_path / "absent.yaml")


def test_differences_name_what_results_depend_on_and_nothing_else(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL)
    other = read(tmp_path, MINIMAL.replace("runs/x", "runs/y") + "seed: 3\nexecutor: {workers: 2}\n")
    assert config.differences(other) == ["seed"]
    assert config.differences(read(tmp_path, MINIMAL.replace("4}", "5}"))) == ["factorization.n_components"]


def test_the_signature_changes_with_the_named_sections_only(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL)
    other = read(tmp_path, MINIMAL.replace("4}", "5}"))
    assert config.signature("task", "fishers") == other.signature("task", "fishers")
    assert config.signature("factorization") != other.signature("factorization")
