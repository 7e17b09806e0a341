"""How well stored Fishers keep inner products: RMS error of ⟨F̂_i, F̂_j⟩ over its RMS, i ≠ j.

Beside our sketch, the two forms that others store: top-k, and projections of each weight from both sides. Fishers are
normalised by their exact norms everywhere, and rounded as they would be stored.

Legend: N examples, R rows, C classes, P parameters, n = N R rows of all examples, x entries of a parameter, D stored
numbers of a row.
"""

from __future__ import annotations

import copy
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import scipy.sparse
import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import Collected, GradientCollector
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor

from fisher_stage import minilm
from fisher_stage.workload import Workload

N_EXAMPLES, BATCH, SEEDS = 64, 16, (0, 1, 2)
LIMITS = {4096: 0.05, 1024: 0.12}
NORM_LIMIT = 1e-4
KRONECKER, TOP = (16, 32), 16384
_COLUMNS = 1 << 16


def accuracy() -> dict[str, Any] | None:
    if not minilm.available():
        print("accuracy: not run, as NPEFF_SHARED_DATA names no folder with the model and the data")
        return None
    with tempfile.TemporaryDirectory() as folder:
        everything = minilm.workload(minilm.model_spec(minilm.config(Path(folder))).load(), BATCH, N_EXAMPLES)
    # the batches of the first shard: the first examples
    work = replace(everything, batches=everything.batches[: N_EXAMPLES // BATCH])
    norms_N = norms_by_autograd(work)
    exact_NN, baselines = exact_and_baselines(work, norms_N)
    table = []
    norm_error = 0.0
    for dim, limit in LIMITS.items():
        errors = []
        for seed in SEEDS:
            rows_nD, found_N = stored_rows(work, SketchSpec("tensorsketch", dim), seed)
            errors.append(off_diagonal_error(inner_products(rows_nD, N_EXAMPLES), exact_NN))
            norm_error = max(norm_error, float((found_N / norms_N - 1).abs().max()))
        size = 2 * dim * len(rows_nD) // N_EXAMPLES
        table.append(_row(f"tensor-sketch D = {dim}, fp16", size, errors, limit))
    for baseline in baselines:
        errors = [off_diagonal_error(found_NN, exact_NN) for found_NN in baseline.found_NN]
        table.append(_row(baseline.name, baseline.bytes_per_example, errors))
    result = {
        "n_examples": N_EXAMPLES,
        "n_parameters": work.layout.size,
        "rms_off_diagonal": float(_off_diagonal(exact_NN).square().mean().sqrt()),
        "largest_norm_error": norm_error,
        "norm_error_limit": NORM_LIMIT,
        "representations": table,
    }
    _show(result)
    return result


def _row(name: str, size: int, errors: list[float], limit: float | None = None) -> dict[str, Any]:
    return {"representation": name, "bytes_per_example": size, "errors": errors, "limit": limit}


def _show(result: dict[str, Any]) -> None:
    print(f"accuracy, {result['n_examples']} examples, P = {result['n_parameters']:,}")
    for row in result["representations"]:
        errors = " ".join(f"{error:6.3f}" for error in row["errors"])
        limit = "" if row["limit"] is None else f"  (at most {row['limit']})"
        print(f"  {row['representation']:<36} {row['bytes_per_example']:>9,} bytes/example  error {errors}{limit}")
    print(f"  norms are off by {result['largest_norm_error']:.1e} at most (at most {result['norm_error_limit']:.0e})")


# --- Inner products ---------------------------------------------------------------------------------------------------


def inner_products(rows_nD: Tensor, n_examples: int) -> Tensor:
    """⟨F_i, F_j⟩ (N, N), float64, from the rows of the factors."""
    return _squared(_products(rows_nD), n_examples)


def _products(rows_nx: Tensor) -> Tensor:
    """Sums over blocks of columns are kept in float64."""
    blocks = [(part_nx @ part_nx.T).double() for part_nx in rows_nx.float().split(_COLUMNS, dim=1)]
    return torch.stack(blocks).sum(0)


def _squared(products_nn: Tensor, n_examples: int) -> Tensor:
    """⟨F_i, F_j⟩ = Σ_{r,s} (a_ir · a_js)²."""
    return products_nn.unflatten(1, (n_examples, -1)).unflatten(0, (n_examples, -1)).square().sum((1, 3))


def _off_diagonal(matrix_NN: Tensor) -> Tensor:
    return matrix_NN[~torch.eye(len(matrix_NN), dtype=torch.bool)]


def off_diagonal_error(found_NN: Tensor, exact_NN: Tensor) -> float:
    """RMS of the difference over the RMS, i ≠ j."""
    difference = _off_diagonal(found_NN - exact_NN)
    return float((difference.square().mean() / _off_diagonal(exact_NN).square().mean()).sqrt())


# --- Exact, and from all entries --------------------------------------------------------------------------------------


def norms_by_autograd(work: Workload) -> Tensor:
    """‖F_i‖_F (N,) in float64, in the order of the batches, by the definition: F = Σ_y p_y ∇log p_y ∇log p_yᵀ.

    A copy of the model in float64, one example at a time, one ordinary backward pass per class.
    """
    model = copy.deepcopy(work.model).double()
    parameters = dict(model.named_parameters())
    selected = [parameters[name].requires_grad_() for name in work.layout.names]
    norms = []
    for numbers, batch, _ in work.batches:
        for place in range(len(numbers)):
            alone = {name: value[place : place + 1] for name, value in batch.items()}
            log_p_C = work.logits(model, alone)[0].log_softmax(0)
            rows = [torch.autograd.grad(log_p, selected, retain_graph=True) for log_p in log_p_C]
            gram_CC = torch.stack([torch.stack([_dot(first, second) for second in rows]) for first in rows])
            roots_C = (0.5 * log_p_C.detach()).exp()
            norms.append((gram_CC * torch.outer(roots_C, roots_C)).norm())
    return torch.stack(norms)


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    return torch.stack([one.flatten() @ other.flatten() for one, other in zip(first, second, strict=True)]).sum()


@dataclass(frozen=True)
class Baseline:
    """What others store: its size, and the inner products that it gives, (N, N), once for each seed."""

    name: str
    bytes_per_example: int
    found_NN: list[Tensor]


def exact_and_baselines(work: Workload, norms_N: Tensor) -> tuple[Tensor, list[Baseline]]:
    """⟨F̂_i, F̂_j⟩ (N, N) in float64 from all rows in full, and the baselines, which need the rows in full too."""
    n_examples = len(norms_N)
    products_nn = torch.zeros((), dtype=torch.float64)
    projected: dict[tuple[int, int], list[Tensor]] = {(size, seed): [] for size in KRONECKER for seed in SEEDS}
    largest = LargestEntries(TOP)
    for name, rows_nx in normalised_rows(work, norms_N):
        products_nn = products_nn + _products(rows_nx)
        largest.add(rows_nx.unflatten(0, (n_examples, -1)))
        for (size, seed), parts in projected.items():
            parts += kronecker(rows_nx, work.layout.shapes[work.layout.names.index(name)], size, f"{seed}:{name}")
    baselines = []
    for size in KRONECKER:
        stored = [torch.cat(projected[size, seed], dim=1).half() for seed in SEEDS]
        stored_bytes = 2 * stored[0].numel() // n_examples
        found = [inner_products(rows_nD, n_examples) for rows_nD in stored]
        baselines.append(Baseline(f"Kronecker {size} x {size} per weight, fp16", stored_bytes, found))
    found_NN = _squared(largest.products(), n_examples)
    baselines.append(Baseline(f"top-k {TOP}, fp32 and indices", 8 * TOP, [found_NN]))
    return _squared(products_nn, n_examples), baselines


def normalised_rows(work: Workload, norms_N: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of one parameter after the other, the rows of all examples, (n, x), in full."""
    collector = GradientCollector(work.model, work.logits, work.layout, work.labels)
    collected: list[Collected] = [collector.collect(*batch) for batch in _arguments(work)]
    scales_N = torch.cat([part.labels.scales_B for part in collected]) / norms_N.sqrt()
    for name in work.layout.names:
        rows_NRx = torch.cat([part.contributions[name].dense().flatten(2) for part in collected])
        yield name, rows_NRx.mul_(scales_N[:, None, None].float()).flatten(0, 1)


def _arguments(work: Workload) -> Iterator[tuple[Any, Sequence[int], Tensor | None]]:
    for numbers, batch, targets in work.batches:
        yield batch, numbers, targets


def stored_rows(work: Workload, sketch: SketchSpec, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised sketched rows (n, D) in float16, as they are stored, and the norms (N,)."""
    linear_map = make_sketch(sketch, work.layout, seed)
    fishers = PerExampleFishers(work.model, work.logits, work.layout, linear_map, work.labels)
    results = [fishers(*batch) for batch in _arguments(work)]
    norms_N = torch.cat([result.frobenius_norms_B for result in results])
    factors_NRD = torch.cat([result.factors_BRD for result in results])
    return (factors_NRD / norms_N.sqrt()[:, None, None].float()).half().flatten(0, 1), norms_N


# --- Baselines --------------------------------------------------------------------------------------------------------


def kronecker(rows_nx: Tensor, shape: Sequence[int], size: int, key: str) -> list[Tensor]:
    """Of a weight's rows G (o, i) the projections S G Tᵀ, (n, D): S and T are random signs, with `size` rows.

    A side that is no longer than that is left as it is; of a bias there is nothing, as where this is used (LoGra,
    bergson).
    """
    if len(shape) != 2:
        return []
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    left, right = (_signs(size, width, generator) for width in shape)
    return [(left @ rows_nx.unflatten(1, tuple(shape)) @ right.T).flatten(1)]


def _signs(size: int, width: int, generator: torch.Generator) -> Tensor:
    if width <= size:
        return torch.eye(width)
    return (2.0 * torch.randint(2, (size, width), generator=generator) - 1) / size**0.5


class LargestEntries:
    """The `kept` largest entries of each example's factor, all of its rows together, as parameters come in turn."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._seen = 0
        self._values: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._columns: list[Tensor] = []

    def add(self, rows_NRx: Tensor) -> None:
        width = rows_NRx.shape[2]
        flat = rows_NRx.flatten(1)
        places = flat.abs().topk(min(self.kept, flat.shape[1])).indices
        self._values.append(flat.gather(1, places))
        self._rows.append(places // width)
        self._columns.append(places % width + self._seen)
        self._seen += width
        values, rows, columns = (torch.cat(parts, dim=1) for parts in (self._values, self._rows, self._columns))
        best = values.abs().topk(min(self.kept, values.shape[1])).indices
        self._values, self._rows, self._columns = ([part.gather(1, best)] for part in (values, rows, columns))

    def products(self) -> Tensor:
        """Inner products of all rows, (n, n), float64."""
        values, rows, columns = self._values[0].double(), self._rows[0], self._columns[0]
        rank = int(rows.max()) + 1
        rows = rows + rank * torch.arange(len(rows))[:, None]
        entries = values.flatten().numpy(), (rows.flatten().numpy(), columns.flatten().numpy())
        sparse = scipy.sparse.csr_array(entries, shape=(rank * len(rows), self._seen))
        return torch.from_numpy((sparse @ sparse.T).toarray())
