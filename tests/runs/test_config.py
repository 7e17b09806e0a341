"""Run files: what is accepted, and that each mistake is named in one line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from npeff.errors import without_values
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.variables import VariableError

MINIMAL = "run_dir: runs/x\ntask: {name: digits}\nfactorization: {n_components: 4}\n"


def read(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return RunConfig.from_yaml(path)


def test_only_three_keys_have_no_default(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL)
    assert config.fishers.sketch.dim == 4096
    assert config.factorization.n_components == 4
    assert (config.executor.kind, config.executor.cpus_per_worker) == ("auto", "auto")
    assert "kind: auto" in config.to_yaml()  # not what this machine makes of it


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
        (MINIMAL + "fishers: {sketch: {dims: 3}}\n", "unknown key 'fishers.sketch.dims' (did you mean 'dim'?)"),
        (MINIMAL + "fishers: {sketch: {seed: 3}}\n", "unknown key 'fishers.sketch.seed'"),
        (MINIMAL + "fishers: {sketch: identity}\n", "fishers.sketch must be a mapping, such as {key: value}"),
        (MINIMAL + "fishers: {sketch: {dim: 0}}\n", ": fishers.sketch.dim must be greater than 0, not 0"),
        (MINIMAL + "fishers: {labels: sampled}\n", ": fishers: labels: sampled needs a rank"),
        (
            MINIMAL + "fishers: {rank: 0, kept_trace: 2}\n",
            ": fishers.rank must be greater than 0, not 0; fishers.kept_trace must be less than or equal to 1, not 2",
        ),
        (MINIMAL.replace("4}", "0}"), ": factorization.n_components must be greater than 0, not 0"),
        (MINIMAL.replace("4}", "4, l1: 1}"), ": factorization.l1 must be less than 1, not 1"),
        (MINIMAL.replace("4}", "4, tolerance: 0}"), ": factorization.tolerance must be greater than 0, not 0"),
        (MINIMAL.replace("4}", "4, n_frozen: 1}"), "unknown key 'factorization.n_frozen'"),
        (MINIMAL + "fishers: {sketch: {kind: identity, dim: 3}}\n", "takes no dim"),
        (MINIMAL + "fishers: {shard_size: 0}\n", "fishers.shard_size must be greater than 0, not 0"),
        (MINIMAL + "fishers: {diagonal: {top: 3}}\n", "unknown key 'fishers.diagonal.top'"),
        (MINIMAL + "fishers: {diagonal: {top_entries: 0}}\n", "fishers.diagonal.top_entries must be greater than 0"),
        (MINIMAL + "seed: -1\n", "seed"),
        (MINIMAL + "executor: {kind: serial, workers: 2}\n", "the serial executor has one worker"),
        (MINIMAL + "verification: {target_kl: 0}\n", "verification.target_kl"),
        ("- a\n- b\n", "is not a run file: it must contain the keys"),
        ("run_dir: [", "not valid YAML: line 1, column 11: "),
        (MINIMAL + "seed: 1\nseed: 2\n", "not valid YAML: line 5, column 1: key 'seed' is given twice"),
        (MINIMAL.replace("runs/x", "''"), "run_dir must be given"),
        (MINIMAL.replace("{name: digits}", "digits"), "task must be a mapping, such as {key: value}, not 'digits'"),
        (MINIMAL + "parameters: {include: '*'}\n", "parameters.include must be a list, such as [\"*\"], not '*'"),
        (MINIMAL.replace("4", "many"), "factorization.n_components must be a whole number, not 'many'"),
        ("", "is not a run file: it must contain the keys"),
        (
            MINIMAL + "inputs: {examples: 0}\n",
            ": inputs.examples must be 'top', 'all' or a whole number greater than 0, not 0",
        ),
        (MINIMAL + "inputs: {examples: few}\n", "must be 'top', 'all' or a whole number greater than 0, not 'few'"),
        (
            MINIMAL + "inputs: {examples: 3000000000}\n",
            "'top', 'all' or a whole number less than or equal to 2147483647, not 3000000000",
        ),
        (
            MINIMAL + "fishers: {batch_size: [1]}\n",
            "batch_size must be a whole number greater than 0 or 'auto', not [1]",
        ),
        (MINIMAL + "scale: {pairs: 0}\n", ": scale.pairs must be a list or a whole number greater than 0, not 0"),
        (
            MINIMAL + "seed: x\ninputs: {examples: 0, samples: 0}\n",
            ": seed must be a whole number, not 'x'; inputs.samples must be greater than 0, not 0; inputs.examples",
        ),
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


@pytest.mark.parametrize(
    ("text", "factorization", "fishers"),
    [
        (MINIMAL, "01a0dd203e6e085b", "a8e8fffbb493e14b"),
        (
            MINIMAL.replace("4}", "4, l1: 0.1, n_starts: 2}") + "seed: 3\n"
            "fishers: {labels: truncated, rank: 3, kept_trace: 0.9, sketch: {kind: kronecker, size: 16}}\n",
            "0f35f172f117d1fd",
            "b6813a84627a0dcb",
        ),
    ],
)
def test_signatures_are_those_that_runs_have_stored(
    tmp_path: Path, text: str, factorization: str, fishers: str
) -> None:
    config = read(tmp_path, text)
    assert config.factorization_signature() == factorization
    assert config.signature("task", "parameters", "fishers", "seed") == fishers


def with_variables(tmp_path: Path) -> RunConfig:
    return read(
        tmp_path,
        "run_dir: runs/${DATA}\nfactorization: {n_components: 4}\nparameters: {include: ['${DATA}*']}\n"
        "task: {name: digits, options: {a: [{b: '${DATA}/x'}], c: '$${DATA}', d: '$DATA ${}', e: 3}}\n",
    )


def test_texts_keep_the_names_of_variables_and_give_the_values_where_they_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = "/data/of ${DATA}: 'mine'"
    monkeypatch.delenv("DATA", raising=False)
    config = with_variables(tmp_path)
    assert config.task.options["a"] == [{"b": "${DATA}/x"}]
    assert read(tmp_path, config.to_yaml()) == config
    monkeypatch.setenv("DATA", value)
    assert without_values(f"no {value}") == "no ${DATA}", "messages have the name from now on"
    assert value not in config.to_yaml()
    assert config.resolved("run_dir") == f"runs/{value}"
    assert config.resolved("parameters.include") == (f"{value}*",)
    assert config.resolved("task.options") == {"a": [{"b": f"{value}/x"}], "c": "${DATA}", "d": "$DATA ${}", "e": 3}
    assert config.resolved("seed") == 0


def test_a_variable_that_is_not_set_is_one_line_where_its_value_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATA", raising=False)
    config = with_variables(tmp_path)
    with pytest.raises(
        VariableError, match=r"^task\.options\.a\.b needs the environment variable DATA, which is not set"
    ):
        config.resolved("task.options")
    with pytest.raises(VariableError, match=r"^run_dir needs the environment variable DATA"):
        config.resolved("run_dir")


def test_a_run_dir_without_a_value_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTHING", "")
    config = read(tmp_path, MINIMAL.replace("runs/x", "${NOTHING}"))
    with pytest.raises(ConfigError, match=r"^run_dir must be given: \$\{NOTHING\} is empty$"):
        config.resolved("run_dir")


def test_settings_have_the_value_of_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SEED": "7", "DIM": "64", "KIND": "serial", "MANY": "8:16:8", "YES": "true"}.items():
        monkeypatch.setenv(name, value)
    config = read(
        tmp_path,
        MINIMAL + "seed: ${SEED}\nfishers: {sketch: {dim: '${DIM}'}, diagonal: {mean: '${YES}'}}\n"
        "executor: {kind: '${KIND}'}\nselection: {components: '${MANY}'}\n",
    )
    assert (config.seed, config.fishers.sketch.dim, config.fishers.diagonal.mean) == (7, 64, True)
    assert (config.executor.kind, config.selection.components) == ("serial", (8, 16))
    assert "${" not in config.to_yaml()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "seed: ${NO_SUCH}\n", "seed needs the environment variable NO_SUCH, which is not set"),
        (
            MINIMAL + "fishers: {sketch: {dim: '${NO_SUCH}'}}\n",
            "fishers.sketch.dim needs the environment variable NO_SUCH, which is not set",
        ),
        (MINIMAL + "seed: ${WORD}\n", "seed must be a whole number, not '${WORD}'"),
        (MINIMAL + "executor: {kind: '${WORD}'}\n", "executor.kind must be 'auto', 'ray' or 'serial', not '${WORD}'"),
        (MINIMAL + "executor: {workers: '${NUMBER}'}\n", "executor.workers must be greater than 0, not '${NUMBER}'"),
        (MINIMAL + "fishers: {sketch: {kind: '${WORD}'}}\n", "not '${WORD}'"),
        (MINIMAL + "fishers: {rank: '${NUMBER}'}\n", "fishers.rank must be greater than 0, not '${NUMBER}'"),
        (MINIMAL.replace("4}", "'${NUMBER}'}"), "n_components must be greater than 0, not '${NUMBER}'"),
        (MINIMAL + "selection: {components: '${WORD}'}\n", "'${WORD}' is not a list of numbers of components"),
        (MINIMAL + "lift: {components: ['${WORD}']}\n", "must be a whole number, not '${WORD}'"),
        (
            MINIMAL + "executor: {cpus_per_worker: '${WORD}'}\n",
            "executor.cpus_per_worker must be a whole number greater than 0 or 'auto', not '${WORD}'",
        ),
        (MINIMAL + "executor: {workers: ['${WORD}']}\n", "must be a whole number, not ['${WORD}']"),
        (MINIMAL.replace("{name: digits}", "'${WORD}'"), "task must be a mapping, such as {key: value}, not '${WORD}'"),
    ],
)
def test_a_mistake_shows_the_name_of_a_variable_and_not_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.setenv("WORD", "a-secret-" * 20)
    monkeypatch.setenv("NUMBER", "-73211")
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(value in str(caught.value) for value in ("a-secret-", "73211"))


def test_another_value_of_a_variable_is_not_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = []
    for value in ("one", "two"):
        monkeypatch.setenv("DATA", value)
        configs.append(with_variables(tmp_path))
    assert configs[0].signature("task", "parameters") == configs[1].signature("task", "parameters")
    assert configs[0].differences(configs[1]) == []
    literal = read(tmp_path, configs[0].to_yaml().replace("${DATA}/x", "$${DATA}/x"))
    assert literal.signature("task") != configs[0].signature("task")
    assert literal.differences(configs[0]) == ["task.options.a"]


def test_a_literal_text_has_the_signature_of_its_value(tmp_path: Path) -> None:
    escaped = read(tmp_path, MINIMAL.replace("digits", "digits, options: {a: '$${DATA}', b: ['x$${Y}']}"))
    content = {"task": {"name": "digits", "options": {"a": "${DATA}", "b": ["x${Y}"]}}}
    stored = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    assert escaped.signature("task") == stored


def test_texts_with_the_same_value_are_those_of_the_stored_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(options: str) -> RunConfig:
        return read(tmp_path, MINIMAL.replace("digits", f"digits, options: {options}") + "seed: 3\n")

    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("OTHER", "/data")
    named, stored = of("{a: ['${DATA}/x', 1], b: '${DATA}/y'}"), of("{a: ['/data/x', 1], b: '/data/z'}")
    assert named.with_texts_of(stored) == of("{a: ['/data/x', 1], b: '${DATA}/y'}")
    assert stored.with_texts_of(named) == of("{a: ['${DATA}/x', 1], b: '/data/z'}")
    assert named.with_texts_of(named) is named
    assert of("{a: '${OTHER}'}").with_texts_of(of("{a: '${DATA}'}")) == of("{a: '${DATA}'}")
    monkeypatch.delenv("OTHER")
    renamed = of("{a: '${OTHER}'}")
    assert renamed.with_texts_of(of("{a: '${DATA}'}")) == renamed
    with pytest.raises(VariableError, match=r"^task\.options\.a needs the environment variable OTHER"):
        renamed.with_texts_of(of("{a: /data}"))
