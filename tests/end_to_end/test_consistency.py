"""Results of one run never speak of different models or of different components."""

from __future__ import annotations

import shutil
from pathlib import Path

import npeff
import pytest
from npeff.errors import NpeffError
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.stage import recorded
from npeff.stages.factorize import FACTORIZE
from npeff.stages.fishers import FISHERS
from npeff.stages.lift import LIFT
from npeff.stages.registry import STAGES
from npeff.stages.verify import VERIFY
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = RunConfig.model_validate(
        {
            "run_dir": str(tmp_path_factory.mktemp("consistency") / "run"),
            "task": {"name": "digits", "options": {"limit": 60, "epochs": 2}},
            "fishers": {"sketch": {"dim": 64}, "shard_size": 30},
            "factorization": {"n_components": 3, "max_iterations": 5},
            "verification": {"top_examples": 4, "baseline_examples": 6},
            "executor": {"kind": "serial"},
        }
    )
    return npeff.run(config).path


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.mark.parametrize("stage", ["fishers", "lift", "verify"])
def test_a_model_that_changed_between_stages_is_refused(run: RunDirectory, stage: str) -> None:
    (weights,) = run.task_cache.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["7.bias"][0] += 1e-3
    save_file(tensors, weights)
    run.reopen(stage)
    shutil.rmtree(run.partial_results(stage), ignore_errors=True)
    if stage == "fishers":
        (run.shard_records / "00001.json").unlink()
    with pytest.raises(
        Exception, match=r"another model than the one of the stored Fishers|belongs to another run"
    ) as caught:
        {each.name: each for each in STAGES}[stage](run)
    assert isinstance(caught.value, NpeffError)


def test_a_new_factorization_takes_the_old_directions_and_verification_away(run: RunDirectory) -> None:
    run.reopen("factorize")
    npeff.factorize(run)
    assert run.directions.exists(), "it is the same to the bit"
    npeff.factorize(RunDirectory(run.path, run.config.with_max_iterations(6)))
    run = RunDirectory.create(run.config.with_max_iterations(6))
    assert not run.directions.exists()
    assert [recorded(run, stage) is None for stage in (FISHERS, FACTORIZE, LIFT, VERIFY)] == [
        False,
        False,
        True,
        True,
    ]
    npeff.lift(run)
    npeff.verify(run)
    assert recorded(run, VERIFY) is not None
