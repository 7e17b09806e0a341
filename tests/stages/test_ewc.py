"""The penalty of runs is that of their Fishers and of the parameters of their models."""

from __future__ import annotations

import shutil
from pathlib import Path

import npeff
import pytest
import torch
from npeff.errors import NpeffError
from npeff.runs.directory import RunDirectory
from npeff.store.array_files import read_arrays, write_arrays
from safetensors.torch import load_file
from training.runs import prepared
from training.tiny_task import TinyTask


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDirectory]:
    return [prepared(tmp_path_factory.mktemp("ewc") / "run", seed) for seed in (0, 1)]


def test_the_penalty_of_runs(runs: list[RunDirectory]) -> None:
    model = TinyTask(seed=2).model(Path())
    expected = torch.zeros(())
    for seed, run in enumerate(runs):
        fisher, anchor = load_file(run.diagonal_fisher), dict(TinyTask(seed).model(Path()).named_parameters())
        for name, parameter in model.named_parameters():
            expected = expected + 5 * (fisher[name] * (parameter - anchor[name]).square()).sum()
    found = npeff.ewc([runs[0], str(runs[1].path)], weight=10).penalty(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert npeff.ewc(runs, weight=10, mode="online", decay=0.5).penalty(TinyTask(1).model(Path())).item() == 0


def test_the_model_of_another_fingerprint_is_refused(runs: list[RunDirectory], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyTask, "shift", 0.1)
    with pytest.raises(NpeffError, match="another model than the one of the stored Fishers"):
        npeff.ewc(runs, weight=1)


def test_empirical_labels_and_runs_without_a_mean_are_refused(tmp_path: Path, runs: list[RunDirectory]) -> None:
    other = RunDirectory.open(shutil.copytree(runs[0].path, tmp_path / "run"))
    arrays, metadata = read_arrays(other.diagonal_fisher)
    write_arrays(other.diagonal_fisher, arrays, {**metadata, "labels": "empirical"})
    with pytest.raises(NpeffError, match="set allow_empirical=True"):
        npeff.ewc([other], weight=1)
    npeff.ewc([other], weight=1, allow_empirical=True)
    other.diagonal_fisher.unlink()
    for given, message in (([other], "has no diagonal_fisher.safetensors"), (runs[0], r"give \[run\]")):
        with pytest.raises(NpeffError, match=message) as caught:
            npeff.ewc(given, weight=1)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(NpeffError, match="at least one"):
        npeff.ewc([], weight=1)
