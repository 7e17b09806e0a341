"""What an iteration costs on machines that are not here: formulas, their constants, and what they predict.

    products     4·n·R·D·K flop / speed, n = N / devices          the two GEMMs of the pass; or where that takes longer
                 2·bytes·n·R·D / bandwidth                        reading the factors twice
    coefficients s·(2·n·K² flop / float32 speed + 4·p·n·K / bandwidth)
                 HALS on a CPU: s = 5 sweeps, p = 38 times the coefficients are read or written in one;
                 accelerated descent on a GPU: s = 20 steps, p = 16
    all-reduce   2·8·(K·D + K²)·(1 − 1/devices) / link            a ring's, float64
    step         (6·2·K²·D + K³/3 + 12·8·K³) flop / (0.4·float64 speed)   products with K×D, Cholesky, 12 CG iterations

    memory of a device: factors bytes·n·R·D, coefficients 4·n·K, state 10·8·K·D

Constants for this machine are measured; those of a GPU are its data sheet's, at a share that large GEMMs reach.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from npeff.factorization import SolverOptions, Statistics, advance, initial_state

_STATE_TENSORS = 10
"""K×D tensors in float64 that are alive in a step: two trials, two statistics, the packed one, the step's own."""
_STEP_PRODUCTS = 6
"""K×D by K×K (or D×Q by Q×K) products of a step, the QR of the components included."""
_SWEEPS, _SWEEP_PASSES = 5, 38
_STEPS, _STEP_PASSES = 20, 16
"""Of HALS and of accelerated descent, where components are little correlated; see `npeff.factorization.nnls`."""
_STEP_SHARE = 0.4
"""Of the speed of a GEMM, which the step's QR and triangular solves do not have (measured here)."""
_SHARE = 0.6
"""Of a data sheet's figures that is counted on."""


@dataclass(frozen=True)
class Machine:
    name: str
    devices: int
    speed: float
    """Flop/s of the GEMMs of the pass, of one device."""
    float32_speed: float
    """Of float32 GEMMs without tensor cores, for the coefficients."""
    bandwidth: float
    """Bytes/s of its memory."""
    float64_speed: float
    link: float
    """Bytes/s of the all-reduce's slowest link."""
    factor_bytes: int
    accelerated: bool


@dataclass(frozen=True)
class Problem:
    n_examples: int
    rank: int
    dim: int
    n_components: int


H100_NODE = Machine(
    f"8 × H100 SXM (data sheet × {_SHARE})",
    devices=8,
    speed=_SHARE * 989e12 / 2,
    float32_speed=_SHARE * 67e12,
    bandwidth=_SHARE * 3.35e12,
    float64_speed=_SHARE * 67e12,
    link=_SHARE * 450e9,
    factor_bytes=2,
    accelerated=True,
)
"""Half of the float16 speed: the components go in as a sum of two float16 matrices."""


def iteration(problem: Problem, machine: Machine) -> dict[str, float]:
    """Seconds of each term, and the bytes of a device."""
    n, r, d, k = problem.n_examples, problem.rank, problem.dim, problem.n_components
    per_device = n / machine.devices
    products = 4 * per_device * r * d * k / machine.speed
    factors = 2 * machine.factor_bytes * per_device * r * d / machine.bandwidth
    rounds, passes = (_STEPS, _STEP_PASSES) if machine.accelerated else (_SWEEPS, _SWEEP_PASSES)
    share = (machine.devices - 1) / machine.devices
    seconds = {
        "products": max(products, factors),
        "coefficients": rounds
        * (2 * per_device * k * k / machine.float32_speed + 4 * passes * per_device * k / machine.bandwidth),
        "all-reduce": 2 * 8 * (k * d + k * k) * share / machine.link,
        "step": (_STEP_PRODUCTS * 2 * k * k * d + k**3 / 3 + 12 * 8 * k**3) / (_STEP_SHARE * machine.float64_speed),
    }
    memory = machine.factor_bytes * per_device * r * d + 4 * per_device * k + _STATE_TENSORS * 8 * k * d
    return {**seconds, "total": sum(seconds.values()), "bytes of a device": memory}


def model(measured_pass: dict[str, Any] | None, tiny: bool) -> dict[str, Any]:
    """This machine's constants, the model beside a measured pass, and the prediction for a million examples."""
    here = _measured(tiny)
    print(f"measured: {here.speed / 1e9:.1f} Gflop/s float32, {here.float64_speed / 1e9:.1f} float64,", end=" ")
    print(f"{here.bandwidth / 1e9:.1f} GB/s, one thread")
    found: dict[str, Any] = {"machine": asdict(here)}
    if measured_pass is not None:
        problem = Problem(measured_pass["n_examples"], 2, measured_pass["dim"], measured_pass["n_components"])
        found["pass here"] = iteration(problem, here)
        predicted = found["pass here"]["products"] + found["pass here"]["coefficients"]
        print(f"one pass here: {predicted:.3f} s predicted, {measured_pass['cpu_s']['float32']:.3f} s measured")
    found["step here"] = _measured_step(here, tiny)
    large = Problem(1_000_000, 2, 16_384, 512)
    found["N = 1e6"] = iteration(large, H100_NODE)
    print(f"N = 1e6, R = 2, D = 16,384, K = 512 on {H100_NODE.name}:")
    for name, value in found["N = 1e6"].items():
        print(f"  {name:<20} {value / 2**30:9.1f} GiB" if "bytes" in name else f"  {name:<20} {1000 * value:9.2f} ms")
    return found


def _measured(tiny: bool) -> Machine:
    torch.set_num_threads(1)
    n = 256 if tiny else 2048

    def seconds(work: Any) -> float:
        times = []
        for _ in range(4):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        return float(np.min(times))

    a, b = torch.randn(256, 4096), torch.randn(4096, n)
    a64, b64 = a.double(), b.double()
    source, target = torch.randn(2**24), torch.empty(2**24)
    float32_speed = 2 * a.numel() * n / seconds(lambda: a @ b)
    return Machine(
        "this machine, one thread",
        devices=1,
        speed=float32_speed,
        float32_speed=float32_speed,
        bandwidth=2 * source.nbytes / seconds(lambda: target.copy_(source)),
        float64_speed=2 * a.numel() * n / seconds(lambda: a64 @ b64),
        link=1e9,
        factor_bytes=4,
        accelerated=False,
    )


def _measured_step(here: Machine, tiny: bool) -> dict[str, float]:
    k, d = (16, 256) if tiny else (256, 4096)
    options = SolverOptions(n_components=k)
    h_KD = torch.nn.functional.normalize(torch.randn(k, d, dtype=torch.float64), dim=1)
    w_NK = torch.rand(4 * k, k, dtype=torch.float64)
    state = initial_state(h_KD, options)
    statistics = Statistics(w_NK.T @ w_NK @ h_KD, w_NK.T @ w_NK, 1.0, 1e9, 4 * k)
    began = time.process_time()
    advance(state, statistics, options)
    measured = time.process_time() - began
    predicted = iteration(Problem(1, 2, d, k), here)["step"]
    print(f"one step here, K = {k}, D = {d}: {predicted:.3f} s predicted, {measured:.3f} s measured")
    return {"predicted": predicted, "measured": measured}
