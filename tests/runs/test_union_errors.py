"""Errors on a part of a value that may have several types: the key names no type of Python."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from npeff.runs.config_reading import one_line
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Inner(BaseModel):
    model_config = ConfigDict(strict=True)

    value: Annotated[tuple[str, ...], Field(strict=False)] | Annotated[int, Field(ge=3)] | None = None
    share: Annotated[float, Field(gt=0.5, lt=1)] | bool | None = None


class Outer(BaseModel):
    inner: Inner = Inner()
    kind: Literal["a", "b"] | dict[str, int] = "a"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"inner": {"value": ["a", 5]}}, "inner.value.1 must be a string, not 5"),
        ({"inner": {"value": 2}}, "inner.value must be a list or a whole number greater than or equal to 3, not 2"),
        ({"inner": {"share": "x"}}, "inner.share must be a number greater than 0.5 or true or false, not 'x'"),
        ({"inner": {"share": 2.0}}, "inner.share must be a number less than 1 or true or false, not 2.0"),
        ({"kind": 1}, "kind must be 'a', 'b' or a mapping, not 1"),
    ],
)
def test_a_value_of_none_of_the_types_is_refused_once(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as found:
        Outer.model_validate(values)
    assert one_line(found.value, Outer) == said
