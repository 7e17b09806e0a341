"""Which covariances of inputs are refused before any computation, and their file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.moments import Moments
from npeff.input_fisher.noise import InputCovarianceError
from npeff.runs.config_input_sections import InputsConfig
from npeff.stages.inputs.covariance import (
    EVERY,
    InputFacts,
    is_current,
    read_noises,
    refuse_covariance,
    write_covariances,
)

TEXT = InputFacts(n_positions=30, n_features=384, exchangeable=True, several_predictions=False, n_parameters=9)
PHOTO = InputFacts(n_positions=224 * 224, n_features=3, exchangeable=False, several_predictions=False, n_parameters=9)
THUMBNAIL = InputFacts(n_positions=1600, n_features=3, exchangeable=False, several_predictions=False, n_parameters=9)


@pytest.mark.parametrize(
    ("options", "facts", "n_covariances", "message"),
    [
        ({"covariance": "kronecker"}, TEXT, 1, r"kronecker needs examples with the same positions.*set it to full"),
        ({}, PHOTO, 1, "at most 4096 entries, and the inputs have 150528: set it to diagonal"),
        ({}, THUMBNAIL, 1, "at most 4096 entries, and the inputs have 4800: set it to kronecker or diagonal"),
        ({"covariance": "kronecker"}, PHOTO, 1, "would need 18.8 GiB: set inputs.covariance to diagonal"),
        ({"scope": "class"}, TEXT, 1000, "would need 1.1 GiB: set inputs.scope to all"),
    ],
)
def test_a_covariance_that_is_too_large_or_has_no_meaning_is_refused(options, facts, n_covariances, message):
    with pytest.raises(InputCovarianceError, match=message):
        refuse_covariance(InputsConfig(**options), facts, n_covariances)


@pytest.mark.parametrize(
    ("options", "facts"),
    [({}, TEXT), ({"covariance": "kronecker"}, THUMBNAIL), ({"covariance": "diagonal"}, PHOTO)],
)
def test_others_are_not(options, facts):
    refuse_covariance(InputsConfig(**options), facts, 1)
    assert 1 <= facts.n_parts(InputsConfig(**options), 1) <= 64


@pytest.mark.parametrize("covariance", ["full", "kronecker", "diagonal", "isotropic"])
def test_the_file_holds_what_was_written(tmp_path: Path, covariance):
    values = torch.randn(30, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    used = torch.ones(30, 4, dtype=torch.bool)
    moments = {EVERY: Moments.of(FlatInputs(values, lambda v: v, used), covariance)}
    facts = InputFacts(4, 2, exchangeable=False, several_predictions=False, n_parameters=9)
    path = tmp_path / "covariance.safetensors"
    write_covariances(path, moments, InputsConfig(covariance=covariance), facts, {EVERY: ""}, "lineage")
    noise = read_noises(path, 0.5, 3, torch.device("cpu"))[EVERY]
    assert (noise.spread, noise.seed) == (0.5, 3)
    torch.testing.assert_close(noise.mean_PF, values.mean(0))
    assert is_current(path, [EVERY], "lineage")
    assert not is_current(path, [EVERY], "another")
    assert not is_current(path, [EVERY, 2], "lineage")
    assert not is_current(path, [EVERY], None)
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_current(path, [EVERY], "lineage")


def test_classes_without_examples_are_refused(tmp_path: Path):
    facts = InputFacts(4, 2, exchangeable=False, several_predictions=False, n_parameters=9)
    options = InputsConfig(scope="class")
    with pytest.raises(
        InputCovarianceError, match=r"class 'cat' has 0 fitted examples .* covariance needs 16: set inp"
    ):
        write_covariances(tmp_path / "c.safetensors", {}, options, facts, {3: "cat"}, None)
