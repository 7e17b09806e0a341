"""The penalty of runs is that of their Fishers and of the parameters of their models."""

from __future__ import annotations

import shutil
from pathlib import Path

import npeff
import pytest
import torch
from npeff.errors import NpeffError
from npeff.runs.directory import RunDirectory
from npeff.storage.checksums import json_checksum
from npeff.store.array_files import read_arrays, write_arrays
from npeff.training import EWC
from safetensors.torch import load_file
from tiny_runs import prepared
from tiny_task import N, TinyTask


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
    empirical = prepared(tmp_path / "empirical", labels="empirical")
    with pytest.raises(NpeffError, match="set allow_empirical=True"):
        npeff.ewc([empirical], weight=1)
    npeff.ewc([empirical], weight=1, allow_empirical=True)
    without = prepared(tmp_path / "without", diagonal={"mean": False})
    deleted = RunDirectory.open(shutil.copytree(runs[0].path, tmp_path / "deleted"))
    deleted.diagonal_fisher.unlink()
    for given, message in (
        ([without], "has no diagonal_fisher.safetensors: set fishers.diagonal.mean: true"),
        ([deleted], "stage fishers of .* is not complete: run `npeff fishers"),
        (runs[0], r"give \[run\]"),
    ):
        with pytest.raises(NpeffError, match=message) as caught:
            npeff.ewc(given, weight=1)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(NpeffError, match="at least one"):
        npeff.ewc([], weight=1)


def damaged(run: RunDirectory, folder: Path, *, with_record: bool = True) -> RunDirectory:
    """A copy of a run with one changed bit in its mean diagonal; without the checksum in the record if it is old."""
    copied = RunDirectory.open(shutil.copytree(run.path, folder))
    content = bytearray(copied.diagonal_fisher.read_bytes())
    content[-1] ^= 1
    copied.diagonal_fisher.write_bytes(content)
    if not with_record:
        kept = ("stage", "completed_at", "checksum", "diagonal_fisher")
        record = {key: value for key, value in (copied.record("fishers") or {}).items() if key not in kept}
        copied.complete("fishers", {**record, "checksum": json_checksum(record)})
    return copied


@pytest.mark.parametrize("with_record", [True, False])
def test_a_changed_bit_in_the_diagonal_is_refused(with_record: bool, tmp_path: Path, runs: list[RunDirectory]) -> None:
    run = damaged(runs[0], tmp_path / "run", with_record=with_record)
    for command in (lambda: npeff.ewc([run], weight=1), lambda: npeff.spectrum(run)):
        with pytest.raises(NpeffError) as caught:
            command()
        message = str(caught.value)
        assert "diagonal_fisher.safetensors does not match its checksum" in message
        assert f"run `npeff check --recompute {run.path}`" in message
        assert "\n" not in message
    with pytest.raises(NpeffError, match=r"diagonal_fisher.safetensors is damaged: .* --recompute"):
        EWC([run.diagonal_fisher], [{}], weight=1)


def test_changed_metadata_of_the_diagonal_are_refused(tmp_path: Path, runs: list[RunDirectory]) -> None:
    """The checksum in the file covers the arrays, that of the record also the kind of labels."""
    run = RunDirectory.open(shutil.copytree(runs[0].path, tmp_path / "run"))
    arrays, metadata = read_arrays(run.diagonal_fisher)
    write_arrays(run.diagonal_fisher, arrays, {**metadata, "labels": "sampled"})
    with pytest.raises(NpeffError, match="does not match its checksum"):
        npeff.ewc([run], weight=1)
    assert [damage.what for damage in npeff.check(run)] == ["diagonal_fisher.safetensors"]
    assert npeff.check(run, recompute=True) == []
    npeff.ewc([run], weight=1)


def dense_fisher(seed: int) -> torch.Tensor:
    """The mean Fisher (P, P) of the examples in float64, by autograd."""
    model, inputs = TinyTask(seed).model(Path()).double(), TinyTask().batch(range(N)).double()
    total = torch.zeros(15, 15, dtype=torch.float64)
    for row in inputs:
        logits = model(row)
        p = logits.softmax(0).detach()
        gradients = [torch.autograd.grad(logit, list(model.parameters()), retain_graph=True) for logit in logits]
        jacobian_CP = torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients])
        total += jacobian_CP.T @ (p.diag() - p[:, None] * p) @ jacobian_CP
    return total / N


@pytest.mark.parametrize("size", ["identity", "more coordinates than rows"])
def test_the_low_rank_penalty_of_runs_is_the_dense_quadratic_form(size: str, tmp_path: Path) -> None:
    """With 15 coordinates, the 24 rows are added up, and with 4,096 they are kept. The sketch of so many is exact to
    rounding where no two of the 15 parameters share a coordinate."""
    sketch = {"kind": "identity"} if size == "identity" else {"kind": "tensorsketch", "dim": 4096}
    options = {"sketch": sketch, "store_dtype": "float32", "shard_size": 5, "diagonal": {"mean": False}}
    runs = [prepared(tmp_path / f"run-{seed}", seed, **options) for seed in (0, 1)]
    model, expected = TinyTask(seed=2).model(Path()), 0.0
    for seed in (0, 1):
        anchor = TinyTask(seed).model(Path())
        pairs = zip(model.parameters(), anchor.parameters(), strict=True)
        change_P = torch.cat([(value - other).flatten() for value, other in pairs]).detach().double()
        expected += 5 * float(change_P @ dense_fisher(seed) @ change_P)
    penalty = npeff.ewc([runs[0], str(runs[1].path)], weight=10, low_rank=True).penalty(model)
    assert penalty.item() == pytest.approx(expected, rel=2e-5)
    penalty.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    leading = npeff.ewc(runs, weight=10, low_rank=True, directions=15).penalty(model)  # of 15 parameters
    assert leading.item() == pytest.approx(expected, rel=2e-5)
    assert npeff.ewc(runs, weight=10, low_rank=True, directions=1).penalty(model).item() < expected
    with pytest.raises(NpeffError, match="directions must be a whole number of at least 1, and needs low_rank=True"):
        npeff.ewc(runs, weight=10, directions=15)
    online = npeff.ewc(runs, weight=10, low_rank=True, mode="online", decay=0.5)
    assert online.penalty(TinyTask(1).model(Path())).item() == 0


def test_low_rank_fishers_that_cannot_be_used_are_refused(
    tmp_path: Path, runs: list[RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    empirical = prepared(tmp_path / "empirical", labels="empirical")
    top = prepared(tmp_path / "top", sketch={"kind": "topk", "size": 5})
    broken = RunDirectory.open(shutil.copytree(runs[0].path, tmp_path / "broken"))
    (broken.shard_records / "00000.json").unlink()
    for run, message in (
        (empirical, "set allow_empirical=True"),
        (top, "has the sketch topk, which is not linear"),
        (broken, "is not complete|has no record"),
    ):
        with pytest.raises(NpeffError, match=message) as caught:
            npeff.ewc([run], weight=1, low_rank=True)
        assert "\n" not in str(caught.value)
    npeff.ewc([empirical], weight=1, low_rank=True, allow_empirical=True)
    monkeypatch.setattr(TinyTask, "shift", 0.1)
    with pytest.raises(NpeffError, match="another model than the one of the stored Fishers"):
        npeff.ewc(runs, weight=1, low_rank=True)
