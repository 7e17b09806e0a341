"""A run that several tests of the stages verify."""

from __future__ import annotations

import npeff
import pytest
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from stages.linear_digits import K


@pytest.fixture(scope="session")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A model that is linear in its parameters, in full coordinates."""
    document = {
        "run_dir": str(tmp_path_factory.mktemp("linear") / "run"),
        "task": {"name": "stages.linear_digits:LinearDigits"},
        "fishers": {"sketch": {"kind": "identity"}, "store_dtype": "float32"},
        "factorization": {"n_components": K, "stability_examples": 0, "held_out_fraction": 0.5},
        "executor": {"kind": "serial"},
    }
    run = RunDirectory.create(RunConfig.model_validate(document))
    for stage in (npeff.compute_fishers, npeff.factorize, npeff.lift):
        stage(run)
    return run
