"""A plan of a run on hardware that is not there: devices, memory, hours and bytes by formulas, without a trial.

Every formula is written where it is used. Numbers of operations follow from the algorithms; how fast a device executes
them is assumed (`Hardware`). `CONSTANTS` lists all factors with their sources. Attention scores are not counted: at 512
tokens, they are 2% of the operations of a model of 8 billion parameters.

Legend: N examples, T tokens of an example, R rank, D sketch, K components, k lifted components, P parameters, P_a those
that a token uses, P_e explained parameters, L blocks, h width, n devices, g devices that share a model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil, floor
from typing import Literal

from npeff.errors import NpeffError
from npeff.store.fisher_arrays import fisher_store_bytes

STEPS, START_STEPS = 60, 20
"""Passes of the solver over the fitted examples, and of each start over the subsample."""
PASSES_PER_ROW = 4
"""Times that an example of a component passes through the model in the verification."""
MATRICES = 11
"""Matrices whose eigenvalues the spectrum needs: of the groups of the jackknife and of parts of the examples."""

_INPUTS, _OUTPUTS, _FFTS = 6.5, 10.5, (4, 7)
_SAVED = 34
_COLLECTED = 1.07
_USABLE = 0.9
_PRODUCT_S, _EIGENVALUE_S = 56 / (100_000 * 2 * 4096**2), 83 / (MATRICES * 4096**3)
_HELD_OUT, _STARTS, _SUBSAMPLE, _STABILITY = 1 / 3, 4, 2048, 4096
_ROWS, _SHOWN = 4 * 32 + 100, 12
_NODE, _LARGEST_BATCH = 8, 64
"""Names and sources of these numbers are in `CONSTANTS`, but for the defaults of run files: the held-out fraction, the
starts, the subsample and the stability of a factorization, the examples of a direction in verify, those in its card."""

CONSTANTS: tuple[tuple[str, str, Literal["measured", "assumed", "algorithm"], str], ...] = (
    ("passes over the fitted examples", str(STEPS), "measured", "solver.py, 5 to 100 on several data sets"),
    ("passes of an example in verify", str(PASSES_PER_ROW), "measured", "verification.py"),
    ("collected rows ÷ passes", str(_COLLECTED), "measured", "fishers.py, MiniLM on a CPU"),
    ("spectrum: s per row and D²", f"{_PRODUCT_S:.2g}", "measured", "spectrum.py, one core of a CPU, per device"),
    ("spectrum: s per matrix and D³", f"{_EIGENVALUE_S:.2g}", "measured", "spectrum.py, one core of a CPU"),
    ("rows of a pass of the model", "1 + R", "algorithm", "one forward pass, R backward passes to the inputs"),
    ("inputs, outputs of a block", f"{_INPUTS} h, {_OUTPUTS} h", "assumed", "Llama 3: MLP of 3.5 h, keys of h/4"),
    ("saved activations of a token", f"{_SAVED} h bytes", "assumed", "Korthikanti et al. 2022, section 4.1"),
    ("usable memory of a device", f"{_USABLE:.0%}", "assumed", ""),
)
"""Name, value, whether it is measured, assumed or part of an algorithm, and its source. Files are those of
tests/benchmarks, with their tables in its README."""


class PlanError(NpeffError):
    """What is to be planned is incomplete or impossible."""


@dataclass(frozen=True)
class Workload:
    """What is computed. The defaults of sizes are those of docs/cluster.md."""

    parameters: float
    """P."""
    active: float
    """P_a, the parameters that a token uses."""
    layers: float
    """L, the number of blocks."""
    width: float
    """h, the size of a token between the blocks."""
    vocabulary: float
    """Number of tokens of the vocabulary."""
    explained: float | None = None
    """P_e; None for all parameters."""
    examples: float = 100_000
    length: float = 512
    """T."""
    rank: float = 4
    dim: float = 16_384
    components: float = 2_048
    lifted: float = 64
    """k, the components with directions in parameter space (``lift.components``)."""
    weight_bytes: float = 2
    direction_bytes: float = 2

    @property
    def lifted_parameters(self) -> float:
        """P_e."""
        return self.parameters if self.explained is None else self.explained


@dataclass(frozen=True)
class Hardware:
    """Devices and links. All speeds are those of data sheets; `utilisation` is the part that is reached."""

    devices: float | None = None
    """n; None for one node of eight, or for g if that is more."""
    devices_per_model: float | None = None
    """g; None for the power of two with the fewest hours."""
    memory: float = 141e9
    """Bytes of a device."""
    flops: float = 989e12
    """FLOP/s in half precision."""
    flops32: float = 67e12
    """FLOP/s in float32 and float64."""
    bandwidth: float = 4.8e12
    """Bytes/s of the memory."""
    link: float = 450e9
    """Bytes/s between the devices of a node of eight."""
    network: float = 50e9
    """Bytes/s of a device to other nodes."""
    bucket: float = 1e9
    """Bytes/s between a device and the bucket."""
    utilisation: float = 0.4


H200 = Hardware()
"""H200 SXM."""
REFERENCES = {
    "8B decoder": Workload(8.0e9, 8.0e9, 32, 4096, 128_256),
    "70B decoder": Workload(70.6e9, 70.6e9, 80, 8192, 128_256),
    "8×22B mixture": Workload(140.6e9, 39.2e9, 56, 6144, 32_768),
}
"""The sizes of Llama 3 and of Mixtral."""


@dataclass(frozen=True)
class Plan:
    """Devices, bytes and hours."""

    devices: int
    devices_per_model: int
    """g, `executor.devices_per_model`."""
    batch: int
    """Sequences that a device computes at a time."""
    directions_at_a_time: int
    """Directions whose sums fit the memory of a device (``lift.memory_limit_mb``). 0 if not one does."""
    memory: dict[str, float]
    """Bytes of a device by what they hold."""
    hours: dict[str, float | None]
    """Hours by stage; None for stages that need a direction, if no direction fits."""
    bucket: dict[str, float]
    """Bytes in the run directory by what they hold."""


def plan(work: Workload, on: Hardware = H200) -> Plan:
    """Plan a run.

    Args:
        work: What is computed.
        on: The devices.

    Returns:
        The plan.

    Raises:
        PlanError: A number is out of range, or one sequence does not fit the devices.
    """
    _check(work, on)
    possible = _possible_groups(work, on)
    n = int(on.devices) if on.devices is not None else max(_NODE, possible[0])
    plans = [_plan_of_groups(work, on, g, n) for g in possible if n % g == 0]
    if not plans:
        raise PlanError(f"{n} devices are not groups of {possible[0]}, which share a model", "give a multiple of it")
    return min(plans, key=lambda each: (each.directions_at_a_time == 0, sum(filter(None, each.hours.values()))))


def _possible_groups(work: Workload, on: Hardware) -> list[int]:
    """Return the numbers of devices that can share a model, so that a sequence fits. They are powers of two."""
    chosen = [int(on.devices_per_model)] if on.devices_per_model else [2**power for power in range(13)]
    free = _USABLE * on.memory - sequence_bytes(work)
    if possible := [g for g in chosen if model_bytes(work, g) <= free]:
        return possible
    needed = model_bytes(work, chosen[-1]) + sequence_bytes(work)
    raise PlanError(
        f"each of {chosen[-1]:,} devices needs {needed / 1e9:,.1f} GB for its share of the model and for a sequence, "
        f"and has {_USABLE * on.memory / 1e9:,.1f} GB",
        "give more devices_per_model, a smaller length or rank, or devices with more memory",
    )


def _plan_of_groups(work: Workload, on: Hardware, g: int, n: int) -> Plan:
    free, one = _USABLE * on.memory - model_bytes(work, g), sequence_bytes(work)
    batch = min(floor(free / one), _LARGEST_BATCH)
    at_a_time = min(floor((free - one) / (4 * work.lifted_parameters)), int(work.lifted))
    seconds: dict[str, float | None] = {**_seconds_without_directions(work, on, g, n, batch)}
    if at_a_time:
        seconds |= _seconds_with_directions(work, on, g, n // g, batch, ceil(work.lifted / at_a_time))
    else:
        seconds |= dict.fromkeys(("lift", "verify", "attribute"))
    return Plan(
        devices=n,
        devices_per_model=g,
        batch=batch,
        directions_at_a_time=at_a_time,
        memory={
            "weights": model_bytes(work, g),
            "a batch": batch * one,
            "a sequence and sums (lift)": one + at_a_time * 4 * work.lifted_parameters,
            "the solver": solver_bytes(work, n // g),
        },
        hours={name: None if each is None else each / 3600 for name, each in seconds.items()},
        bucket=bucket_bytes(work),
    )


def _seconds_without_directions(work: Workload, on: Hardware, g: int, n: int, batch: int) -> dict[str, float]:
    """Return the seconds of `fishers`, which all n devices compute, and of stages with one device of each worker."""
    stored, workers = bucket_bytes(work)["fishers"] / on.bucket, n // g
    fishers = work.examples * (collection_seconds(work, on, g, batch) + compression_seconds(work, on))
    rows = work.examples * work.rank
    return {
        "fishers": _load_seconds(work, on) + (fishers + stored) / n,
        "spectrum": rows * work.dim**2 * _PRODUCT_S / workers + MATRICES * work.dim**3 * _EIGENVALUE_S,
        "factorize": stored / workers + solver_seconds(work, on, workers),
    }


def _seconds_with_directions(
    work: Workload, on: Hardware, g: int, workers: int, batch: int, blocks: int
) -> dict[str, float]:
    """Return the seconds of the stages in which one device of each worker computes.

    Each of the `blocks` of directions is a pass over the fitted examples, with one sequence at a time.
    """
    collect, fitted = collection_seconds(work, on, g, 1), work.examples * (1 - _HELD_OUT)
    added, written = blocks * collect + row_sum_seconds(work, on, blocks), bucket_bytes(work)["directions"] / on.bucket
    seconds = {
        "lift": fitted * added + written,
        "verify": verification_seconds(work, on, g, batch),
        "attribute": min(work.examples, work.lifted * _SHOWN) * collect,
    }
    return {name: _load_seconds(work, on) + each / workers for name, each in seconds.items()}


def _load_seconds(work: Workload, on: Hardware) -> float:
    """Return the seconds in which the first device of a worker reads the model."""
    return work.parameters * work.weight_bytes / on.bucket


def _check(work: Workload, on: Hardware) -> None:
    for each in (*((work, field.name) for field in fields(work)), *((on, field.name) for field in fields(on))):
        value = getattr(*each)
        if value is not None and not 0 < value < 1e30:
            known = "is not known" if value != value else f"must be above 0, not {value:g}"
            raise PlanError(f"{each[1]} {known}", f"give --assume {each[1]}=NUMBER")
    if work.active > work.parameters or work.lifted > work.components:
        names = ("active", "parameters") if work.active > work.parameters else ("lifted", "components")
        raise PlanError(f"{names[0]} must be at most {names[1]}", f"give a smaller {names[0]}")


def model_bytes(work: Workload, g: int) -> float:
    """Return the bytes of the model on each of g devices: its share, and two whole blocks if it is shared."""
    weights = work.parameters * work.weight_bytes
    return weights / g + (2 * weights / work.layers if g > 1 else 0.0)


def sequence_bytes(work: Workload) -> float:
    """Return the bytes of one example while its rows are collected.

    These are the activations that autograd saves, the inputs and the R gradients of all linear layers, and R + 3 times
    the logits in float32.
    """
    layers = work.layers * work.width * (_SAVED + work.weight_bytes * (_INPUTS + work.rank * _OUTPUTS))
    return work.length * (layers + 4 * (work.rank + 3) * work.vocabulary)


def collection_seconds(work: Workload, on: Hardware, g: int, batch: int) -> float:
    """Return the seconds of one device for the gradient rows of one example: (1 + R)·2·P_a·T FLOP.

    In every pass over a batch, a device fetches the parts of each block from the g − 1 others, and then computes.
    """
    passes = (1 + work.rank) * 2 * work.active * work.length * _COLLECTED / (on.utilisation * on.flops)
    return passes + (1 + work.rank) * _gather_seconds(work, on, g) / batch


def _gather_seconds(work: Workload, on: Hardware, g: int) -> float:
    link = on.link if g <= _NODE else on.network
    return work.parameters * work.weight_bytes * (g - 1) / g / (on.utilisation * link)


def compression_seconds(work: Workload, on: Hardware) -> float:
    """Return the seconds of one device for the exact Gram matrix and the sketch of one example.

    Gram matrices, in float32: 2·T²·(inputs + R·outputs) + R²·T·outputs FLOP of a block, or those of formed rows,
    2·R·T·P_a/L + 2·R²·P_a/L, if these are fewer. Sketches: transforms of w = D/4 numbers, for each token 4 of inputs
    and 7·R of gradients in a block, each of which is read or written three times.
    """
    tokens, rank, block = work.length, work.rank, work.active / work.layers
    products = 2 * tokens**2 * work.width * (_INPUTS + rank * _OUTPUTS) + rank**2 * tokens * work.width * _OUTPUTS
    formed = 2 * rank * tokens * block + 2 * rank**2 * block
    inputs, outputs = _FFTS
    moved = 3 * 4 * work.dim / 4 * tokens * (inputs + rank * outputs)
    return work.layers * (
        min(products, formed) / (on.utilisation * on.flops32) + moved / (on.utilisation * on.bandwidth)
    )


def row_sum_seconds(work: Workload, on: Hardware, blocks: int) -> float:
    """Return the seconds of one device to add one example to the sums of all directions, in float32.

    Rows are formed once for each block of directions, 2·R·T·P_a FLOP, and added, 2·k·R·P_e FLOP.
    """
    share = work.lifted_parameters / work.parameters
    formed = blocks * 2 * work.rank * work.length * work.active * share
    return (formed + 2 * work.lifted * work.rank * work.lifted_parameters) / (on.utilisation * on.flops32)


def solver_seconds(work: Workload, on: Hardware, n: int) -> float:
    """Return the seconds of the factorization: all passes, and the steps between them.

    The terms are those of tests/benchmarks/solver_stage/cost_model.py for a GPU.
    """
    fitted, k, dim = work.examples * (1 - _HELD_OUT), work.components, work.dim
    products = max(
        4 * work.rank * dim * k / (on.utilisation * on.flops / 2), 4 * work.rank * dim / (on.utilisation * on.bandwidth)
    )
    coefficients = 20 * (2 * k * k / (on.utilisation * on.flops32) + 4 * 16 * k / (on.utilisation * on.bandwidth))
    link = on.link if n <= _NODE else on.network
    reduce = 2 * 8 * (k * dim + k * k) * (n - 1) / n / (on.utilisation * link)
    step = (6 * 2 * k * k * dim + k**3 / 3 + 12 * 8 * k**3) / (0.4 * on.utilisation * on.flops32)
    starts, refits = START_STEPS * _STARTS, 2 * STEPS
    in_passes = STEPS * fitted / n + starts * min(fitted, _SUBSAMPLE) + refits * min(fitted, _STABILITY) / 2
    return in_passes * (products + coefficients) + STEPS * reduce + (STEPS + starts + refits) * step


def solver_bytes(work: Workload, n: int) -> float:
    """Return the bytes of a device in the factorization: factors in float16, coefficients, and ten K × D matrices."""
    share = work.examples * (1 - _HELD_OUT) / n
    return share * (2 * work.rank * work.dim + 4 * work.components) + 80 * work.components * work.dim


def verification_seconds(work: Workload, on: Hardware, g: int, batch: int) -> float:
    """Return the seconds of one device for the verification: forward passes of its examples, and reading directions."""
    passed = work.lifted * _ROWS * PASSES_PER_ROW
    forward = 2 * work.active * work.length / (on.utilisation * on.flops)
    read = work.lifted * work.lifted_parameters * work.direction_bytes / on.bucket
    return read + passed * (forward + _gather_seconds(work, on, g) / batch)


def bucket_bytes(work: Workload) -> dict[str, float]:
    """Return the bytes of the arrays that the run keeps, without the tables, of a model with several predictions per
    example (no stored logits)."""
    n, k, dim = int(work.examples), int(work.components), int(work.dim)
    store = {"rank": int(work.rank), "dim": dim, "n_classes": 2, "store_dtype": "float16", "with_logits": False}
    fishers = fisher_store_bytes(n_examples=n, shard_size=256, **store)
    return {
        "fishers": float(fishers),
        "factorization": 8.0 * k * dim + 2 * 4.0 * n * k,  # components, coefficients and evidence
        "directions": work.lifted * (work.lifted_parameters * work.direction_bytes + 4 * dim),
    }
