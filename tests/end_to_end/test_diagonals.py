"""What the Fisher stage keeps of diagonals is their definition, whatever the shards, the workers and interruptions.

Legend: N examples, C classes, P parameters, k largest entries, Q groups.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import torch
from end_to_end.nan_digits import DAMAGED, NanDigits
from npeff.execution.executor import WorkerSpec
from npeff.execution.serial import SerialExecutor
from npeff.gradients import model_fingerprint, select_parameters
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.stage import recorded
from npeff.stages.fishers import FISHERS
from npeff.store import diagonal_store
from npeff.store.fisher_store import FisherStore
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

N, TOP, PER_EXAMPLE = 70, 50, {"top_entries": 50, "groups": True}
OPTIONS = {"limit": N, "epochs": 1}


def prepared(path: Path, limit: int = N, shard_size: int = 8, **fishers: Any) -> RunDirectory:
    config = {
        "run_dir": str(path),
        "task": {"name": "end_to_end.nan_digits:NanDigits", "options": {**OPTIONS, "limit": limit}},
        "fishers": {
            "sketch": {"kind": "tensorsketch", "dim": 64},
            "shard_size": shard_size,
            "batch_size": 16,
            "store_dtype": "float32",
            **fishers,
        },
        "factorization": {"n_components": 2},
        "executor": {"kind": "serial"},
    }
    return RunDirectory.create(RunConfig.model_validate(config))


@pytest.fixture(scope="module", autouse=True)
def small_units() -> Iterator[None]:
    """Nine shards make five units, of which three are added up at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagonal_store, "_FEWEST_UNITS", 4)
        patch.setattr(diagonal_store, "_FOLDED_TOGETHER", 3)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = prepared(tmp_path_factory.mktemp("diagonals") / "run", diagonal={"mean": True, **PER_EXAMPLE})
    npeff.compute_fishers(run)
    return run


@pytest.fixture(scope="module")
def model(whole: RunDirectory) -> nn.Module:
    return NanDigits(**OPTIONS).model(whole.task_cache)


@pytest.fixture(scope="module")
def diagonals_NP(whole: RunDirectory, model: nn.Module) -> Tensor:
    """float64, by definition: Σ_y p(y) (∂ log p(y) / ∂θ)², and zero for the damaged example."""
    task = NanDigits(**OPTIONS)
    network = task.model(whole.task_cache).double()
    rows = []
    for example in range(N):
        log_p_C = network(task.examples(whole.task_cache).batch([example]).double())[0].log_softmax(0)
        diagonal_P = torch.zeros(select_parameters(network).size, dtype=torch.float64)
        for log_p in log_p_C if example != DAMAGED else ():
            gradients = torch.autograd.grad(log_p, list(network.parameters()), retain_graph=True)
            score_P = torch.cat([part.flatten() for part in gradients])
            diagonal_P += log_p.detach().exp() * score_P.square()
        rows.append(diagonal_P)
    return torch.stack(rows)


def files_of(run: RunDirectory) -> dict[str, bytes]:
    """The Fishers and the mean; what a run says of itself has times in it."""
    paths = [run.diagonal_fisher, *(path for path in run.fishers.rglob("*") if path.is_file())]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in paths}


def rows_of(run: RunDirectory) -> dict[str, np.ndarray]:
    return FisherStore.open(run.fishers).read_rows(np.arange(N))


class Backwards(SerialExecutor):
    """Gives the items in the order that is the worst one for adding up."""

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **more: Any) -> Iterator[tuple[Any, Any]]:
        return super().map(spec, method, list(items)[::-1], **more)


class Watched(SerialExecutor):
    """Knows what was asked for, and is interrupted after some items of the units, if so wished."""

    def __init__(self, interrupted_after: int | None = None) -> None:
        super().__init__()
        self.asked: list[tuple[str, Any]] = []
        self._left = interrupted_after

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **more: Any) -> Iterator[tuple[Any, Any]]:
        for item, result in super().map(spec, method, items, **more):
            if method == "compute_unit" and self._left is not None:
                if self._left == 0:
                    raise KeyboardInterrupt
                self._left -= 1
            self.asked.append((method, item))
            yield item, result


def test_the_mean_is_the_diagonal_of_the_data_sets_fisher(
    whole: RunDirectory, model: nn.Module, diagonals_NP: Tensor
) -> None:
    mean = load_file(whole.diagonal_fisher)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: values.shape for name, values in mean.items()} == shapes
    assert {values.dtype for values in mean.values()} == {torch.float32}
    found_P = torch.cat([mean[name].double().flatten() for name in shapes])
    expected_P = diagonals_NP.sum(0) / (N - 1)
    torch.testing.assert_close(found_P / expected_P.max(), expected_P / expected_P.max(), rtol=1e-4, atol=1e-7)
    with safe_open(whole.diagonal_fisher, "pt") as file:
        assert {name: value for name, value in file.metadata().items() if name != "checksum"} == {
            "labels": "exact",
            "n_examples": str(N - 1),
            "model_fingerprint": model_fingerprint(model, select_parameters(model)),
        }
    assert not whole.partial_results("diagonal").exists()


def test_the_largest_entries_and_the_grouped_sums_are_of_the_definition(
    whole: RunDirectory, model: nn.Module, diagonals_NP: Tensor
) -> None:
    stored = {name: torch.from_numpy(values) for name, values in rows_of(whole).items() if "diagonal" in name}
    norms_N = diagonals_NP.norm(dim=1)
    unit_NP = diagonals_NP / norms_N.where(norms_N > 0, 1)[:, None]
    torch.testing.assert_close(stored["diagonal_norms"], norms_N, rtol=1e-4, atol=0)
    close = {"rtol": 1e-4, "atol": 1e-6}
    values_Nk, indices_Nk = stored["diagonal_values"].double(), stored["diagonal_indices"]
    torch.testing.assert_close(values_Nk, unit_NP.topk(TOP).values, **close)
    torch.testing.assert_close(values_Nk, unit_NP.gather(1, indices_Nk).where(values_Nk > 0, 0), **close)
    assert all(len(set(row)) == TOP for i, row in enumerate(indices_Nk.tolist()) if i != DAMAGED)

    groups = FisherStore.open(whole.fishers).attrs["diagonal_groups"]
    assert groups == [["0.weight", 8], ["2.weight", 16], ["5.weight", 32], ["7.weight", 10]]
    blocks = unit_NP.split([parameter.numel() for parameter in model.parameters()], 1)
    parts = dict(zip(dict(model.named_parameters()), blocks, strict=True))
    sums = []
    for name, count in groups:
        weight_NQ = parts[name].reshape(N, count, -1).sum(2)
        sums.append(weight_NQ + parts[name.replace("weight", "bias")])
    torch.testing.assert_close(stored["grouped_diagonal"].double(), torch.cat(sums, 1), rtol=1e-4, atol=1e-5)


def test_an_example_that_is_not_valid_has_zeros(whole: RunDirectory) -> None:
    rows = rows_of(whole)
    assert not rows["valid"][DAMAGED]
    names = [name for name in rows if "diagonal" in name]
    assert len(names) == 4
    for name in names:
        assert not rows[name][DAMAGED].any()
        assert rows[name][DAMAGED - 1].any()


def test_the_order_in_which_workers_finish_changes_no_bit(whole: RunDirectory, tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", diagonal={"mean": True, **PER_EXAMPLE})
    npeff.compute_fishers(run, executor=Backwards())
    assert files_of(run) == files_of(whole)


@pytest.mark.parametrize(
    ("after", "kept", "again"),
    [(2, {"00000", "00001", "00002"}, {0, 3, 4}), (4, {"total", "00003", "00004"}, {0, 1, 2})],
    ids=["before the first are added up", "afterwards"],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    whole: RunDirectory, tmp_path: Path, after: int, kept: set[str], again: set[int]
) -> None:
    run = prepared(tmp_path / "run", diagonal={"mean": True, **PER_EXAMPLE})
    with pytest.raises(KeyboardInterrupt):
        npeff.compute_fishers(run, executor=Watched(interrupted_after=after))
    assert not run.diagonal_fisher.exists()
    folder = run.partial_results("diagonal")
    assert {path.stem for path in folder.iterdir()} == kept
    lost = folder / ("total.safetensors" if "total" in kept else "00000.safetensors")
    lost.unlink()
    for shard in (0, 1, 3):  # 3 is of a unit whose sum is there, or that is computed again anyway
        (run.shard_records / f"{shard:05d}.json").unlink()
    watched = Watched()
    npeff.compute_fishers(run, executor=watched)
    assert {item for method, item in watched.asked if method == "compute_unit"} == again
    assert [item for method, item in watched.asked if method == "compute"] == ([(3,)] if after == 2 else [])
    assert files_of(run) == files_of(whole)


def test_a_lost_mean_is_made_again_and_a_lost_shard_alone(whole: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory.open(shutil.copytree(whole.path, tmp_path / "run"))
    expected = files_of(run)
    (run.shard_records / "00004.json").unlink()
    run.fishers.joinpath("diagonal_values/c/4/0").write_bytes(b"")
    assert recorded(run, FISHERS) is None
    watched = Watched()
    npeff.compute_fishers(run, executor=watched)
    assert watched.asked[1:] == [("compute", (4,))]
    assert files_of(run) == expected
    run.diagonal_fisher.unlink()
    assert recorded(run, FISHERS) is None
    npeff.compute_fishers(run)
    assert files_of(run) == expected


def test_the_sizes_of_shards_do_not_matter(whole: RunDirectory, tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", shard_size=40, diagonal={"mean": True, **PER_EXAMPLE})
    npeff.compute_fishers(run)
    mean, expected = load_file(run.diagonal_fisher), load_file(whole.diagonal_fisher)
    for name, values in expected.items():
        torch.testing.assert_close(mean[name] / values.max(), values / values.max(), rtol=1e-5, atol=1e-7)
    rows, former = rows_of(run), rows_of(whole)
    for name in ("diagonal_norms", "diagonal_values", "grouped_diagonal"):
        np.testing.assert_allclose(rows[name], former[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "labels", [{"labels": "truncated", "rank": 3}, {"labels": "sampled", "rank": 2}, {"labels": "empirical"}]
)
def test_the_mean_is_of_the_stored_factors_whatever_the_labels(labels: dict[str, Any], tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", 20, 8, sketch={"kind": "identity"}, diagonal={"mean": True}, **labels)
    npeff.compute_fishers(run)
    store = FisherStore.open(run.fishers)
    assert not [name for name in store.array_names if "diagonal" in name]
    rows = store.read_rows(np.arange(20), ["factors", "frobenius_norms"])
    factors_NRP = rows["factors"].astype(np.float64)
    expected_P = (np.square(factors_NRP).sum(1) * rows["frobenius_norms"][:, None]).sum(0) / 19
    mean = load_file(run.diagonal_fisher)
    found_P = np.concatenate([mean[name].flatten() for name in store.attrs["parameter_layout"]["names"]])
    np.testing.assert_allclose(found_P / expected_P.max(), expected_P / expected_P.max(), rtol=1e-4, atol=1e-7)
    with safe_open(run.diagonal_fisher, "pt") as file:
        assert file.metadata()["labels"] == labels["labels"]


def test_nothing_is_kept_of_diagonals_unless_asked_for(tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", 20, 8)
    npeff.compute_fishers(run)
    assert not run.diagonal_fisher.exists()
    assert not run.partial_results("diagonal").exists()
    store = FisherStore.open(run.fishers)
    assert not [name for name in (*store.array_names, *store.attrs) if "diagonal" in name]


def test_more_entries_than_there_are_parameters_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", 20, 8, diagonal={"top_entries": 9803})
    with pytest.raises(ConfigError, match=r"fishers\.diagonal\.top_entries = 9803 must be at most 9802"):
        npeff.compute_fishers(run)
    assert not run.fishers.exists()
