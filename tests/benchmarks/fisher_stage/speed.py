"""Time of the stage per example over that of the passes that nobody can avoid, and what the rest goes to.

Two threads, by the clock, everything in turn in every round, with ratios taken within a round. What is learnt
once of the model is learnt in a round that warms up and is not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.gradients import GradientCollector, LabelSpec, exact_label_factor
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.sketches import SketchSpec, make_sketch
from npeff.stages.fishers.worker import FisherWorker
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardRecords
from torch import Tensor

from fisher_stage import minilm
from fisher_stage.workload import floor, interleaved, median_and_spread, pieces

THREADS, N_EXAMPLES, SHARD, BATCH = 2, 512, 256, 32
N_FEW, FEW_BATCH = 16, 4
LIMITS, STRETCH = {1024: 1.35, 4096: 2.0}, {1024: 1.2, 4096: 1.5}


def speed(rounds: int) -> dict[str, Any] | None:
    if not minilm.available():
        print("speed: not run, as NPEFF_SHARED_DATA names no folder with the model and the data")
        return None
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        minilm.drawn_pairs(N_EXAMPLES, folder / "pairs.txt")
        spec = minilm.model_spec(minilm.config(folder, folder / "pairs.txt"))
        loaded = spec.load()
        work = minilm.workload(loaded, BATCH, SHARD)
        few = loaded.batches(range(0, N_EXAMPLES, N_EXAMPLES // N_FEW), FEW_BATCH)
        sketches = {dim: SketchSpec("tensorsketch", dim) for dim in LIMITS}
        maps = {f"sketch D={dim}": make_sketch(sketch, work.layout, 0) for dim, sketch in sketches.items()}
        collector = GradientCollector(work.model, work.logits, work.layout)
        variants: dict[str, Callable[[], Any]] = {
            "floor": partial(floor, work),
            "pieces": partial(pieces, work, collector, maps),
        }
        for dim, sketch in sketches.items():
            stage, write = _stage_and_write(spec, sketch, folder / str(dim))
            variants |= {f"stage D={dim}": stage, f"write D={dim}": write}
        variants["loop, one backward pass per class"] = partial(_each, loaded, few, loop_rows)
        variants["vmap(grad)"] = partial(_each, loaded, few, vmap_rows)
        seconds = interleaved(variants, rounds)
    few_names = list(variants)[-2:]
    per_example = {name: times / (N_FEW if name in few_names else N_EXAMPLES) for name, times in seconds.items()}
    rows = [
        {
            "what": name,
            "ms_per_example": 1000 * float(np.median(times)),
            "times_the_floor": median_and_spread(times / per_example["floor"]),
        }
        for name, times in per_example.items()
    ]
    limits = {f"stage D={dim}": {"limit": LIMITS[dim], "stretch": STRETCH[dim]} for dim in LIMITS}
    result = {
        "threads": THREADS,
        "rounds": rounds,
        "n_examples": N_EXAMPLES,
        "batch_size": BATCH,
        "rows": [row | limits.get(str(row["what"]), {}) for row in rows],
    }
    _show(result)
    return result


def _show(result: dict[str, Any]) -> None:
    about = f"{result['n_examples']} examples, batches of {result['batch_size']}, {result['threads']} threads"
    print(f"speed, {about}, {result['rounds']} rounds")
    for row in result["rows"]:
        ratio = row["times_the_floor"]
        spread = f"{ratio['median']:6.3f} × the floor ({ratio['least']:.3f} to {ratio['most']:.3f})"
        limit = f"  at most {row['limit']}, stretch {row['stretch']}" if "limit" in row else ""
        print(f"  {row['what']:<34} {row['ms_per_example']:8.3f} ms/example {spread}{limit}")


def _stage_and_write(
    spec: ModelSpec, sketch: SketchSpec, folder: Path
) -> tuple[Callable[[], object], Callable[[], object]]:
    """All shards as a worker computes and stores them; and storing alone, of what the first time left."""
    assert sketch.dim is not None
    store = FisherStore.create(
        folder / "fishers.zarr",
        n_examples=N_EXAMPLES,
        rank=2,
        dim=sketch.dim,
        n_classes=3,
        shard_size=SHARD,
        store_dtype="float16",
        attrs={},
    )
    records = ShardRecords(folder / "shards", "benchmark")
    worker = FisherWorker(spec, LabelSpec(), sketch, 0, store.path, records, BATCH)
    shards = tuple(range(store.plan.n_shards))
    worker.compute(shards)
    arrays = [store.read_shard(shard) for shard in shards]
    for values in arrays:
        values["factors"] = values["factors"].astype(np.float16)

    def write() -> None:
        for shard, values in zip(shards, arrays, strict=True):
            store.write_shard(shard, values)

    return lambda: _nothing(worker.compute(shards)), write


def _nothing(_result: object) -> None:
    """Records are no seconds of parts."""


# --- What one would write without this package: dense rows, nothing else ----------------------------------------------


def _each(
    loaded: LoadedModel, batches: Sequence[list[int]], rows: Callable[[LoadedModel, dict[str, Tensor]], Tensor]
) -> None:
    for numbers in batches:
        rows(loaded, loaded.batch(numbers))


def loop_rows(loaded: LoadedModel, batch: dict[str, Tensor]) -> Tensor:
    """√p_y ∇log p(y) for every class, by ordinary autograd: C = R + 1 backward passes for each example; the last."""
    parameters = dict(loaded.model.named_parameters())
    selected = [parameters[name].requires_grad_() for name in loaded.layout.names]
    for place in range(len(batch["input_ids"])):
        log_p_C = loaded.logits(loaded.model, _alone(batch, place))[0].log_softmax(0)
        rows = []
        for label, log_p in enumerate(log_p_C):
            gradients = torch.autograd.grad(log_p, selected, retain_graph=label + 1 < len(log_p_C))
            rows.append(torch.cat([part.flatten() for part in gradients]) * (0.5 * log_p.detach()).exp())
    return torch.stack(rows)


def _alone(batch: dict[str, Tensor], place: int) -> dict[str, Tensor]:
    """One example of a batch, without its padding."""
    length = int(batch["attention_mask"][place].sum())
    return {name: value[place : place + 1, :length] for name, value in batch.items()}


def vmap_rows(loaded: LoadedModel, batch: dict[str, Tensor]) -> Tensor:
    """Gradient rows (B, R, P) by `torch.func.vmap` of `grad`, over examples and over the columns of L."""
    parameters = {name: value.detach() for name, value in loaded.model.named_parameters()}
    selected = {name: parameters.pop(name) for name in loaded.layout.names}
    with torch.no_grad():
        factors_BCR = exact_label_factor(loaded.logits(loaded.model, batch)).float()

    # attention takes a mask of four axes as it is; of two, transformers looks at its values, which vmap refuses
    batch = batch | {"attention_mask": batch["attention_mask"].bool()[:, None, None]}

    def score(selected: dict[str, Tensor], example: dict[str, Tensor], direction_C: Tensor) -> Tensor:
        alone = {name: value[None] for name, value in example.items()}
        return torch.func.functional_call(loaded.model, selected | parameters, (), alone).logits[0] @ direction_C

    per_row = torch.func.vmap(torch.func.grad(score), in_dims=(None, None, 1))
    rows = torch.func.vmap(per_row, in_dims=(None, 0, 0))(selected, batch, factors_BCR)
    return torch.cat([rows[name].flatten(2) for name in loaded.layout.names], dim=2)
