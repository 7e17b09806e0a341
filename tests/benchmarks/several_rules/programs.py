"""Exported Tracr programs. Tracr and jax are in an environment of their own, which is made where it is missing."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

from environments import environment
from npeff.tasks.planted.tracr_model import PROGRAM_FILE

PROGRAMS = ("counts", "order")
REQUIREMENTS = ("tracr-pypi==1.0.0", "jax==0.10.2")
N_EXAMPLES, SEED = 1500, 0
PIPELINE = Path(__file__).parents[3] / "pipeline"


def exported(folder: Path) -> list[Path] | None:
    """Return the folders of the programs, which are exported if they are missing; None if this is impossible.

    The environment has tracr and jax only. All other packages, such as torch, are those of this interpreter.
    """
    folders = [folder / name for name in PROGRAMS]
    missing = [path for path in folders if not (path / PROGRAM_FILE).exists()]
    if not missing:
        return folders
    folder.mkdir(parents=True, exist_ok=True)
    python = environment(folder / "environment", REQUIREMENTS)
    if python is None:
        return None
    paths = os.pathsep.join([str(PIPELINE), sysconfig.get_paths()["purelib"]])
    for path in missing:
        command = [str(python), "-m", "npeff.tasks.planted.tracr_export", path.name, str(path)]
        command += ["--examples", str(N_EXAMPLES), "--seed", str(SEED)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
        if done.returncode:
            print(f"not exported: {' '.join(command)} failed: {done.stderr.strip()[-300:]}")
            return None
    return folders
