"""YAML of run files: what a text stands for, and that every text is read or refused in bounded time with its place."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from npeff.runs import yaml_text
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError, read_run_file
from npeff.runs.yaml_text import parse, plain_value, write

TEXTS = (
    *("yes", "no", "on", "off", "Yes", "NO", "y", "010", "00", "08", "1_000", "1:30", "8:32:8", "1:100000000000"),
    *("2024-01-01", "0b11", "0x", "1e", ".", "+", "-.nan", "=", "1.5.2", "٣", "1 000", "1,5"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_words_and_numbers_of_yaml_1_1_are_texts(text: str) -> None:
    assert parse(f"key: {text}".encode()) == {"key": text}
    assert plain_value(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0", 0), ("-7", -7), ("+7", 7), ("0x1F", 31), ("0o17", 15), ("9" * 40, int("9" * 40))),
        *(("1e-6", 1e-6), ("1E3", 1000.0), (".5", 0.5), ("3.", 3.0), ("-0.0", -0.0), ("1e400", math.inf)),
        *((".inf", math.inf), ("-.INF", -math.inf), ("true", True), ("False", False)),
    ],
)
def test_numbers_and_booleans_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    for found in (parse(text.encode()), plain_value(text)):
        assert (found, type(found)) == (value, type(value))


def test_null_and_nan() -> None:
    assert parse(b"[~, null, Null]") == [None, None, None]
    assert math.isnan(parse(b".nan"))
    assert parse(b"") is None
    assert parse("\ufeffa: 1".encode()) == {"a": 1}, "a byte order mark at the beginning"
    assert parse(b"a: &x {b: 1}\nc: {<<: *x, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.sampled_from(TEXTS)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "on", "1e3", "<<"]), inner),
    max_leaves=6,
)


@given(VALUES)
@settings(derandomize=True, max_examples=30, deadline=None)
def test_what_is_written_is_read_back_by_this_reader_and_by_one_of_yaml_1_1(value: Any) -> None:
    text = write({"key": value})
    assert parse(text.encode()) == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("? [a, b]\n: 1", "line 1, column 3: a key must be a text or a whole number"),
        ("a: 1\n? {b: 1}\n: 1", "line 2, column 3: a key must be a text or a whole number"),
        ("null: 1", "line 1, column 1: a key must be a text or a whole number"),
        (".nan: 1", "line 1, column 1: a key must be a text or a whole number"),
        ("a: &x [1, *x]", "line 1, column 11: the anchor 'x' contains itself"),
        ("a: &x {b: {c: *x}}", "line 1, column 15: the anchor 'x' contains itself"),
        ("a: *x", "line 1, column 4: found undefined alias 'x'"),
        (BOMB, "there are more than 20000 values"),
        (MERGES, "there are more than 20000 values"),
        (f"a: [{'1,' * 20_001}]", "there are more than 20000 values"),
        (nested(60), "line 1, column 51: more than 50 lists and mappings are nested"),
        (nested(5_000), "line 1, column 51: more than 50 lists and mappings are nested"),
        ("{a: " * 100_000, "more than 50 lists and mappings are nested"),
        ("- " * 100_000, "more than 50 lists and mappings are nested"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' is given twice"),
        ("a: {1: 2, '1': 3}", "line 1, column 11: key '1' is given twice"),
        ("a: " + "9" * 5_000, "line 1, column 4: a whole number has 5000 digits"),
        ("a: 0x" + "f" * 5_000, "a whole number has 5002 digits"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: the tag 'tag:yaml.org,2002:python/"),
        ("a: !!int abc", "line 1, column 4: the tag"),
        ("a: !!binary '%'", "line 1, column 4: the tag"),
        ("a: !!timestamp x", "line 1, column 4: the tag"),
        ("a: !!set {b}", "line 1, column 4: the tag"),
        ("a: ! b", "line 1, column 4: the tag '!' is not supported"),
        ("a: !e!x b", "line 1, column 4: found undefined tag handle"),
        ("a: 1\n---\nb: 2", "line 2, column 1: a second document begins here"),
        ("a: 1\n...\n---\nb: 2", "line 3, column 1: a second document begins here"),
        ("a:\n\t- 1", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("a: 1\nb: \x07", "line 2, column 4: the character U+0007 is not allowed"),
        ('a: "\\ud800"', "line 1, column 4: a text contains the character U+D800"),
        ('a: "x\\0"', "line 1, column 4: a text contains the character U+0000"),
        ("a: 1\n\ufeffb: 2", "line 2, column 1: a text contains the character U+FEFF"),
        ("a: {<<: 3}", "expected a mapping or list of mappings for merging"),
        ("a: 'b", "found unexpected end of stream"),
        ("%YAML 9.1\n--- a", "found incompatible YAML document"),
        ("&a &b c", "line 1, column 4: "),
        ("@a: 1", "line 1, column 1: found character '@' that cannot start any token"),
    ],
    ids=range(37),
)
def test_a_text_that_is_refused_is_one_line_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    begun = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_run_file(path)
    assert time.process_time() - begun < 20
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path} is not valid YAML: line ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: 1\nb: \xe4\n", "line 2, column 4: the byte 0xe4 is not UTF-8: save the file as UTF-8"),
        ("a: 1".encode("utf-16"), "line 1, column 1: the byte 0xff is not UTF-8"),
        ("a: 1".encode("utf-16-be"), "line 1, column 1: the character U+0000 is not allowed"),
        (b"#" * (yaml_text.LARGEST_FILE + 1), "is not a run file: it is larger than 1048576 bytes"),
        (b"", "is not a run file: it must contain the keys"),
        (b"\x93\x08", "line 1, column 1: the byte 0x93 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_text_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_endless_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        RunConfig.from_yaml("/dev/zero")
    with pytest.raises(ConfigError, match="cannot read"):
        RunConfig.from_yaml("a\0b")
