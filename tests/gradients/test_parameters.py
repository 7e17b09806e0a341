from __future__ import annotations

import json
import pickle

import pytest
import torch
from npeff.gradients import ParameterLayout, UnsupportedModelError, model_fingerprint, select_parameters
from torch import nn


def model() -> nn.Module:
    torch.manual_seed(0)
    tied = nn.Linear(3, 3)
    return nn.ModuleDict({"first": nn.Linear(2, 3), "tied": tied, "again": tied, "norm": nn.BatchNorm1d(3)})


def test_globs_include_and_exclude_and_shared_parameters_appear_once() -> None:
    assert select_parameters(model()).names == (
        "first.weight",
        "first.bias",
        "tied.weight",
        "tied.bias",
        "norm.weight",
        "norm.bias",
    )
    layout = select_parameters(model(), ["first.*", "*.weight"], ["norm.*"])
    assert layout.names == ("first.weight", "first.bias", "tied.weight")
    assert (layout.sizes, layout.offsets, layout.size) == ((6, 3, 9), (0, 6, 9), 18)


@pytest.mark.parametrize(("include", "exclude"), [(["frist.*"], []), (["first.*"], ["*"]), ([], [])])
def test_a_selection_of_nothing_is_refused_in_one_line(include: list[str], exclude: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        select_parameters(model(), include, exclude)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_layout_survives_json() -> None:
    layout = select_parameters(model())
    assert ParameterLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_stacks_of_matrices_are_named_in_the_layout_and_in_json_only_if_there_are_some() -> None:
    shapes = ((4, 2, 3), (4, 2, 3), (5,), ())
    layout = ParameterLayout(("experts", "filters", "bias", "scale"), shapes, stacked=("experts",))
    assert layout.matrices == ((8, 3), (4, 6), (5, 1), (1, 1))
    assert ParameterLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert layout.to_json()["stacked"] == ["experts"]
    assert set(ParameterLayout(layout.names, shapes).to_json()) == {"names", "shapes"}


def test_fingerprint_changes_with_values_selection_and_type_only() -> None:
    one, layout = model(), select_parameters(model())
    fingerprint = model_fingerprint(one, layout)
    assert model_fingerprint(model(), layout) == fingerprint
    assert model_fingerprint(one, select_parameters(one, ["first.*"])) != fingerprint
    assert model_fingerprint(model().bfloat16(), layout) != fingerprint
    with torch.no_grad():
        bias = one.get_parameter("first.bias")
        bias[0] = bias[0].nextafter(torch.tensor(1e9))
    assert model_fingerprint(one, layout) != fingerprint
