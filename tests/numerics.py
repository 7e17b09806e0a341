"""The tests that compare numbers, under several settings of the libraries that compute them.

    python tests/numerics.py [--core] [PYTEST OPTIONS]

MKL (torch), OpenBLAS (numpy and scipy) and torch's own kernels have code of their own for each instruction set, and
divide sums among threads: the last bits of a result depend on all of these. A test that passes under every setting
does not rest on one processor's rounding. Prints a table; exit code 1 if a setting failed. A setting that this
processor has no instructions for is skipped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

CORE = (
    "tests/factorization",
    "tests/gradients",
    "tests/sketches",
    "tests/fisher",
    "tests/directions",
    "tests/verification",
    "tests/input_fisher",
    "tests/training",
    "tests/perception",
    "tests/models/test_streams.py",
    "tests/stages/test_solver_workers.py",
)
END_TO_END = (
    "tests/end_to_end/test_attribution.py",
    "tests/end_to_end/test_check.py",
    "tests/end_to_end/test_consistency.py",
    "tests/end_to_end/test_diagonal_factorization.py",
    "tests/end_to_end/test_diagonals.py",
    "tests/end_to_end/test_extend.py",
    "tests/end_to_end/test_lift.py",
    "tests/end_to_end/test_polish.py",
    "tests/end_to_end/test_repair.py",
)
LEFT_OUT = "not unbiased and not estimator_checks and not every_check_of_scikit_learn"
"""Statistics of many draws, and scikit-learn's checks of the interface: long, and not about rounding."""
LEVELS = ("DEFAULT", "AVX2", "AVX512")
"""Instruction sets as `torch.backends.cpu.get_cpu_capability` names them; each has all of the former ones."""
VARIABLES = ("MKL_CBWR", "OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Setting:
    variables: dict[str, str] = field(default_factory=dict)
    """Of the environment; those of `VARIABLES` that are not here are not set, but for one thread."""
    level: str = "DEFAULT"
    """The instruction set that it needs."""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.variables.items()) or "nothing set"


SETTINGS = (
    Setting(),
    Setting({"OMP_NUM_THREADS": "2"}),
    Setting({"MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Nehalem", "ATEN_CPU_CAPABILITY": "default"}),
    Setting({"MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell", "ATEN_CPU_CAPABILITY": "avx2"}, "AVX2"),
    Setting({"MKL_CBWR": "AVX512", "OPENBLAS_CORETYPE": "SkylakeX"}, "AVX512"),
    Setting({"MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Zen", "OMP_NUM_THREADS": "2"}, "AVX2"),
    Setting({"MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "4"}, "AVX2"),
)


def reason_to_skip(setting: Setting, best: str, has_mkl: bool) -> str | None:
    """Why a setting would change nothing, or not run, on this machine."""
    if setting.variables.keys() <= {"OMP_NUM_THREADS"}:
        return None
    if best not in LEVELS or not has_mkl:
        return "for x86 processors with MKL"
    if LEVELS.index(best) < LEVELS.index(setting.level):
        return f"this processor has no {setting.level}"
    return None


def passes(setting: Setting, arguments: list[str]) -> bool:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    # threads that wait sleep, or they would take the processor from those of other tests
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **setting.variables}
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Further options are pytest's.")
    parser.add_argument("--core", action="store_true", help="leave the end-to-end tests out")
    chosen, options = parser.parse_known_args()
    os.chdir(Path(__file__).resolve().parents[1])
    best, has_mkl = torch.backends.cpu.get_cpu_capability(), torch.backends.mkl.is_available()
    files = CORE if chosen.core else CORE + END_TO_END
    rows, failed = [], False
    for setting in SETTINGS:
        if (reason := reason_to_skip(setting, best, has_mkl)) is not None:
            rows.append((str(setting), f"skipped: {reason}"))
            continue
        print(f"\n=== {setting} ===", flush=True)
        began = time.monotonic()
        passed = passes(setting, ["-q", "--durations=0", "--durations-min=20", "-k", LEFT_OUT, *options, *files])
        rows.append((str(setting), f"{'passed' if passed else 'FAILED'}, {time.monotonic() - began:.0f} s"))
        failed |= not passed
    width = max(len(name) for name, _ in rows)
    print(f"\nThis processor has {best}.")
    for name, outcome in rows:
        print(f"{name:<{width}}  {outcome}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
