"""Which package may import which: held by reading the import statements, whatever a test happens to import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline" / "npeff"

TENSORS = {"torch", "numpy"}
ARRAYS = {"numpy", "scipy"}
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "variables": (set(), {"errors"}),
    "options": (set(), {"errors"}),
    "views": ({"IPython"}, set()),
    "statistics": (ARRAYS, set()),
    "perception": (ARRAYS, set()),
    "gradients": (TENSORS, {"errors", "options"}),
    "sketches": (TENSORS, {"gradients", "options"}),
    "fisher": (TENSORS | {"scipy", "threadpoolctl"}, {"gradients", "sketches"}),
    "input_fisher": (TENSORS, {"errors", "gradients", "fisher"}),
    "training": ({"torch", "safetensors"}, {"errors", "gradients", "fisher", "input_fisher"}),
    "factorization": (TENSORS | {"scipy", "sklearn"}, {"errors", "options"}),
    "directions": (TENSORS, {"gradients", "fisher"}),
    "verification": (TENSORS | {"scipy"}, {"gradients", "directions", "statistics"}),
    "tasks": (
        TENSORS
        | {"transformers", "sklearn", "pyarrow", "safetensors", "PIL", "datasets", "peft", "tokenizers", "tracr"}
        | {"torchao"},
        {"errors", "perception", "training"},
    ),
    "storage": ({"numpy", "zarr", "zarrs", "obstore"}, {"errors"}),
    "store": ({"zarr", "pyarrow", "numpy", "safetensors"}, {"errors", "storage"}),
    "execution": (TENSORS | {"ray", "aiohttp", "requests", "dask"}, {"errors"}),  # Ray's job client raises their errors
    "runs": (
        {"pydantic", "yaml", "rich", "IPython"},
        {"errors", "variables", "options", "views", "storage", "store", "execution"},
    ),
    "models": (
        TENSORS | {"pyarrow"},
        {"errors", "variables", "tasks", "gradients", "fisher", "input_fisher", "execution", "store"},
    ),
    "query": (
        {"numpy", "scipy", "zarr", "dask", "pyarrow", "duckdb"},
        {"errors", "variables", "views", "store", "storage", "statistics"},
    ),
    "reports": (
        ARRAYS | {"pyarrow", "jinja2", "markupsafe", "PIL"},
        {"errors", "query", "store", "storage", "statistics"},
    ),
    "stages": (TENSORS | {"scipy", "pyarrow", "safetensors", "mlflow", "wandb"}, {"*"}),
    "live": (
        {"numpy", "torch", "pyarrow", "sklearn", "jinja2", "starlette", "uvicorn"},
        {"errors", "variables", "statistics", "storage", "store", "query", "reports", "runs", "stages", "models"}
        | {"tasks", "fisher", "factorization", "verification"},
    ),
    "interchange": (
        {"h5py", "huggingface_hub", "pyarrow", "safetensors", "torch", "numpy"},
        {
            "errors",
            "variables",
            "query",
            "reports",
            "verification",
            "stages",
            "runs",
            "store",
            "storage",
            "factorization",
        },
    ),
    "cli": (
        {"typer", "rich", "pyarrow"},
        {"errors", "variables", "perception", "stages", "live", "interchange", "runs", "execution", "query", "storage"},
    ),
}
"""For each room (a package or a module of this project), floor by floor: the third-party packages and the rooms that it
may import, besides itself and the standard library. "*" is every room above it in this table."""


def imports(source: Path) -> Iterator[str]:
    """Top-level names of third-party imports, and ``npeff.x`` for this project's own."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            names = [node.module or ""]
            if node.module == "npeff":
                names = [f"npeff.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield ".".join(parts[:2]) if parts[0] == "npeff" else parts[0]


def sources(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_place_in_the_house_allows(room: str) -> None:
    third_party, rooms = ROOMS[room]
    if "*" in rooms:
        rooms = set(list(ROOMS)[: list(ROOMS).index(room)])
    allowed = third_party | {f"{PACKAGE.name}.{name}" for name in (*rooms, room)} | set(sys.stdlib_module_names)
    if room == "cli":
        allowed |= {"npeff"}  # the public names, which are loaded on first use
    found = {(str(path.relative_to(ROOT)), used) for path in sources(room) for used in imports(path)}
    assert found, f"no source found for {room}"
    assert {(path, used) for path, used in found if used not in allowed} == set()


def test_every_room_has_a_rule() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} == set(ROOMS)


def test_no_room_is_imported_from_below() -> None:
    order = list(ROOMS)
    for room, (_, rooms) in ROOMS.items():
        assert all(order.index(name) < order.index(room) for name in rooms - {"*"}), room


@pytest.mark.process
def test_only_one_folder_imports_ray_and_only_where_ray_was_chosen() -> None:
    importers = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if "ray" in set(imports(path))}
    assert all(path.startswith("pipeline/npeff/execution/ray/") for path in importers)
    script = (
        "import sys, npeff, npeff.stages.pipeline; from npeff.execution.create import make_executor;"
        "make_executor('serial', address='local', workers=1, cpus_per_worker=1, gpus_per_worker=0, timeout_s=1);"
        "print([name for name in ('ray', 'transformers') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


@pytest.mark.process
def test_importing_the_package_is_cheap() -> None:
    script = "import sys, npeff; print([name for name in ('torch', 'ray', 'zarr') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


@pytest.mark.process
def test_training_needs_no_run() -> None:
    script = (
        "import sys, npeff.training; wanted = ('ray', 'zarr', 'dask', 'transformers', 'pydantic', 'npeff.runs');"
        "print([name for name in wanted if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


@pytest.mark.process
def test_reading_a_run_file_imports_no_arrays() -> None:
    script = (
        "import sys, npeff.runs.config; print([name for name in ('torch', 'numpy', 'scipy') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def test_every_error_that_a_user_can_cause_has_one_base() -> None:
    internal = {"WorkerLostError", "HeldError", "_DamagedError"}  # each is caught inside the package
    bases = {
        node.name: {getattr(base, "id", "") for base in node.bases}
        for path in PACKAGE.rglob("*.py")
        if "Error(" in (source := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.name not in internal
    }
    known = {"Exception", "NpeffError"}
    while more := {name for name, of in bases.items() if of & (known - {"Exception"})} - known:
        known |= more
    assert set(bases) <= known


def test_the_architecture_page_has_this_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    shown = {room: (set(re.findall(r"\w+", third)), set(re.findall(r"`(\w+)`", rooms))) for room, rooms, third in rows}
    expected = {room: (third, rooms - {"*"}) for room, (third, rooms) in ROOMS.items()}
    assert list(shown) == list(expected)
    assert shown == expected
