"""Any value at any key of a run file gives a configuration, or one line that names the key, in bounded time."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import command
from npeff.errors import printable
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.sections import section_of
from pydantic import BaseModel

MINIMAL: dict[str, Any] = {"run_dir": "runs/x", "task": {"name": "digits"}, "factorization": {"n_components": 4}}


def keys_of(model: Any, section: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every section and every key of a section, from the models."""
    if is_dataclass(model):
        yield from ((*section, field.name) for field in fields(model))
    elif isinstance(model, type) and issubclass(model, BaseModel):
        for name, field in model.model_fields.items():
            key = (*section, field.alias or name)
            yield key
            yield from keys_of(section_of(field.annotation) or field.annotation, key)


KEYS = [*keys_of(RunConfig), ("no_such_key",), ("fishers", "no_such_key"), ("task", "options", "of_the_task")]

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**18, 10**30, 10**39, -(10**30)),
    *(0.5, 1.0, -0.5, 1e-300, 1e18, 1e30, 1e308, math.inf, -math.inf, math.nan),
    *(
        "",
        "x",
        "3",
        "010",
        "yes",
        "on",
        "1e3",
        ".inf",
        "1:30",
        "1:100000000000",
        "9" * 300,
        "a\nb",
        "\x1b[31m",
        "ü" * 300,
    ),
    *("${HOME}", "${NO_SUCH_VARIABLE}", "$${HOME}", "s3://", "http://x/y", "~no-such-user/x", "../..", "x:y", "-1"),
    *(
        [],
        [1],
        ["a"],
        [[]],
        [None],
        [True],
        [10**30],
        [math.nan],
        {},
        {"a": 1},
        {1: 2},
        {"a": {"b": [{}]}},
        [[[[[1]]]]],
    ),
    *(datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1, 12), b"bytes", {"a"}, list(range(20))),
]


def document(key: tuple[str, ...], value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {name: dict(part) if isinstance(part, dict) else part for name, part in MINIMAL.items()}
    section = tree
    for name in key[:-1]:
        section = section.setdefault(name, {})
    section[key[-1]] = value
    return tree


def numbers_of(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from numbers_of(value)
    elif isinstance(tree, float):
        yield tree


def check_outcome(path: Path, text: str, key: tuple[str, ...]) -> None:
    """A configuration that can be written and read again, or one line."""
    path.write_text(text)
    begun = time.process_time()
    try:
        config = RunConfig.from_yaml(path)
    except ConfigError as error:
        said = str(error)
        assert len(said.splitlines()) == 1, said
        assert printable(said) == said, said
        assert len(said) < 1500, said
        assert any(name in said for name in (key[-1], key[0], "YAML")), said
    else:
        stored = config.to_yaml()
        path.write_text(stored)
        again = RunConfig.from_yaml(path)
        assert again.to_yaml() == stored
        assert again.signature("task", "fishers") == config.signature("task", "fishers")
        assert all(map(math.isfinite, numbers_of(config.model_dump(exclude={"task"}))))
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("number", range(len(KEYS)), ids=[".".join(key) for key in KEYS])
def test_odd_values_of_every_key_are_accepted_or_refused_in_one_line(tmp_path: Path, number: int) -> None:
    key = KEYS[number]
    for value in ODD[number % 9 :: 9]:  # each key has some of the values, and each value some of the keys
        check_outcome(tmp_path / "run.yaml", yaml.safe_dump(document(key, value)), key)


FEW = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates()
VALUES = st.recursive(
    SCALARS | st.integers(-(10**45), 10**45) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(KEYS), VALUES)
@settings(FEW, max_examples=40)
def test_any_value_of_any_key_is_accepted_or_refused_in_one_line(
    tmp_path: Path, key: tuple[str, ...], value: Any
) -> None:
    check_outcome(tmp_path / "run.yaml", yaml.safe_dump(document(key, value)), key)


@given(st.text(st.sampled_from("ab:-?[]{}&*!|>'\"%@`#,\n\t 0.~<\x07é\ufeff"), max_size=60) | st.binary(max_size=60))
@settings(FEW, max_examples=100)
def test_any_file_is_accepted_or_refused_in_one_line(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "value", [10**5000, object(), {"a": object()}, datetime.timedelta(1), 1j, b"\xff"], ids=range(6)
)
@pytest.mark.parametrize("key", ["executor.timeout_s", "seed", "fishers.sketch.dim", "selection.components"])
def test_objects_of_python_are_refused_in_one_line(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        RunConfig._validated(document(tuple(key.split(".")), value), Path("run.yaml"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", KEYS[::15], ids=".".join)
def test_the_command_ends_with_code_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], key: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in ([{"a": math.nan}], "\x1b[31m\n" * 50):
        Path("run.yaml").write_text(yaml.safe_dump(document(key, value)))
        assert command("status", "run.yaml") == 2  # a configuration whose run does not exist is an error too
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("npeff: error: ")
        assert printable(line) == line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("executor: {timeout_s: .inf}", "executor.timeout_s must be a finite number, not inf"),
        ("executor: {timeout_s: 1e9}", "executor.timeout_s must be less than or equal to 31622400, not 1000000000.0"),
        ("executor: {workers: 100000}", "executor.workers must be less than or equal to 4096, not 100000"),
        ("verification: {epsilon: .inf}", "verification.epsilon must be a finite number, not inf"),
        ("verification: {epsilon: 1e30}", "verification.epsilon must be less than or equal to 1000000000, not 1e+30"),
        ("verification: {target_kl: .nan}", "verification.target_kl must be a finite number, not nan"),
        ("verification: {ablation: yes}", "verification.ablation must be true or false, not 'yes'"),
        ("verification: {ablation: 1}", "verification.ablation must be true or false, not 1"),
        ("seed: 010", "seed must be a whole number, not '010'"),
        ("seed: 1:30", "seed must be a whole number, not '1:30'"),
        ("seed: '3'", "seed must be a whole number, not '3'"),
        ("seed: true", "seed must be a whole number, not True"),
        ("seed: 3.0", "seed must be a whole number, not 3.0"),
        ("fishers: {sketch: {dim: true}}", "fishers.sketch.dim must be a whole number, not True"),
        ("fishers: {sketch: {dim: 4294967296}}", "fishers.sketch.dim must be less than or equal to 2147483647, not"),
        ("fishers: {kept_trace: .nan, labels: truncated, rank: 2}", "fishers.kept_trace must be a finite number"),
        ("fishers: {shard_size: 1000000000000000000}", "fishers.shard_size must be less than or equal to 2147483647"),
        ("selection: {components: 1:100000000000}", "has more than 10000: give 8,16,32 or 8:64:8"),
        ("lift: {components: [true]}", "lift.components.0 must be a whole number, not True"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_with_its_bound(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: runs/x\ntask: {{name: digits}}\nfactorization: {{n_components: 4}}\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(path)
    assert said in str(caught.value)


def test_small_numbers_in_words_of_yaml_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run_dir: runs/x\ntask: {name: digits}\nfactorization: {n_components: 4, tolerance: 1e-7}\n"
        "selection: {components: 8:32:8}\nexecutor: {timeout_s: 1e3}\n"
    )
    config = RunConfig.from_yaml(path)
    assert (config.factorization.tolerance, config.executor.timeout_s) == (1e-7, 1000.0)
    assert config.selection.components == (8, 16, 24, 32)
