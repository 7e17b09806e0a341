"""Environment variables of run files: their values, and texts that show names instead of values."""

from __future__ import annotations

import pytest
from npeff import errors
from npeff.errors import NpeffError, as_one_line, first_line, hide_value_of, hide_values, shows_values, without_values
from npeff.variables import VariableError, for_hash, has_references, literal, resolved

SECRET = "wahr/schein-lich'es"


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_hidden_names", set())
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)


def test_references_are_replaced_in_every_text_but_not_in_keys() -> None:
    tree = {"${TOKEN}": ["a${TOKEN}b${EMPTY}", ("${TOKEN}",), 3, None], "b": "$TOKEN $${TOKEN} ${} $${UNSET}"}
    assert resolved(tree, "task.options") == {
        "${TOKEN}": [f"a{SECRET}b", (SECRET,), 3, None],
        "b": "$TOKEN ${TOKEN} ${} ${UNSET}",
    }


def test_a_value_is_not_resolved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "${TOKEN}")
    assert resolved("${TOKEN}", "key") == "${TOKEN}"


def test_an_unset_variable_is_named_with_the_key() -> None:
    said = r"^task\.options\.token needs the environment variable UNSET, which is not set on .+: export UNSET=… there"
    with pytest.raises(VariableError, match=said):
        resolved({"token": ["x${UNSET}"]}, "task.options")


@pytest.mark.parametrize("text", ["${TOKEN}", "$${TOKEN}", "$$${TOKEN}", "a $ {b}", "${1}", "${a}${b}"])
def test_a_literal_text_is_its_own_value(text: str) -> None:
    assert resolved(literal({"key": [text]}), "") == {"key": [text]}
    assert not has_references(literal(text))


def test_a_hash_has_names_and_tells_them_from_the_same_literal_text() -> None:
    assert for_hash(["plain", "$${TOKEN}", 3]) == ["plain", "${TOKEN}", 3]
    marked = for_hash("${TOKEN}")
    assert "TOKEN" in marked
    assert marked not in ("${TOKEN}", "$${TOKEN}")
    assert SECRET not in marked


def test_texts_show_names_once_a_variable_was_resolved() -> None:
    assert without_values(f"no {SECRET}") == f"no {SECRET}"
    resolved("${TOKEN}", "key")
    assert without_values(f"no {SECRET}/x, {SECRET!r}") == "no ${TOKEN}/x, '${TOKEN}'".replace("'", '"')
    assert without_values("https://host/?token=wahr%2Fschein-lich%27es") == "https://host/?token=${TOKEN}"


def test_short_values_are_shown_and_longer_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT", "abc")
    monkeypatch.setenv("PART", "abcd/")
    monkeypatch.setenv("WHOLE", "abcd/efgh")
    for name in ("SHORT", "PART", "WHOLE", "EMPTY", "UNSET"):
        hide_value_of(name)
    assert without_values("abc abcd/efgh abcd") == "abc ${WHOLE} ${PART}"


def test_a_value_is_replaced_before_a_line_is_cut() -> None:
    hide_value_of("TOKEN")
    error = RuntimeError(f"a  b {SECRET} c")
    assert as_one_line(error, 9) == "a b ${TO…"
    assert first_line(error) == "a  b ${TOKEN} c"


def test_an_error_forgets_the_value_and_causes_that_show_it() -> None:
    hide_value_of("TOKEN")
    for cause, is_kept in (("no secret", True), (f"file {SECRET}", False)):
        error = NpeffError(f"cannot read {SECRET}", f"restore {SECRET}")
        error.__cause__ = FileNotFoundError(cause)
        assert shows_values(error)
        hide_values(error)
        assert str(error) == "cannot read ${TOKEN}: restore ${TOKEN}"
        assert (error.problem, error.remedy) == ("cannot read ${TOKEN}", "restore ${TOKEN}")
        assert not shows_values(error)
        assert (error.__cause__ is not None) == is_kept
