"""Which package may import which: held by reading the import statements, whatever a test happens to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline"

PURE = {"torch", "numpy"}
ALLOWED: dict[str, set[str]] = {
    "fisher": PURE,
    "factorization": PURE | {"scipy", "sklearn"},
    "store": {"zarr", "pyarrow", "numpy", "h5py", "safetensors", "upath", "fsspec", "s3fs", "botocore", "aiohttp"},
    "tasks": PURE | {"transformers", "sklearn", "pyarrow", "safetensors", "PIL", "datasets", "peft"},
    "verification": PURE | {"scipy", "pipeline.contingency", "pipeline.fisher"},
    "runtime": PURE
    | {"ray", "aiohttp", "pyarrow", "safetensors"}  # Ray's job client raises aiohttp's errors
    | {f"pipeline.{name}" for name in ("tasks", "fisher", "factorization", "verification", "store")},
    "query": {"numpy", "scipy", "zarr", "dask", "pyarrow", "duckdb", "jinja2", "markupsafe", "yaml", "PIL"}
    | {"pipeline.contingency", "pipeline.store"},
    "errors": set(),
    "contingency": {"numpy", "scipy"},
    "config": {"pydantic", "yaml"},
    "run_directory": {"pipeline.config", "pipeline.store"},
    "progress": {"rich"},
    "result_tables": {"numpy", "pyarrow"} | {f"pipeline.{name}" for name in ("run_directory", "store", "verification")},
    "interchange": {"numpy", "pyarrow", "torch"}
    | {
        f"pipeline.{name}"
        for name in ("config", "factorization", "progress", "result_tables", "run_directory", "store")
    },
    "metrics": {"torch", "pipeline.config", "pipeline.store"},
    "stage": {"numpy", "torch"}
    | {
        f"pipeline.{name}"
        for name in ("config", "factorization", "fisher", "interchange", "run_directory", "runtime", "store")
    },
    "estimate": {f"pipeline.{name}" for name in ("config", "runtime", "stage", "store")},
    "status": {f"pipeline.{name}" for name in ("run_directory", "stage", "store")},
    "query_output": {"typer", "rich", "pyarrow"},
    "query_commands": {"typer", "pipeline.run_directory", "pipeline.stages", "pipeline.query_output"},
    "job_commands": {"typer", "rich"}
    | {f"pipeline.{name}" for name in ("config", "run_directory", "stages", "status")},
    "cli": {"typer", "rich"}
    | {
        f"pipeline.{name}"
        for name in (
            "stages",
            "status",
            "estimate",
            "interchange",
            "job_commands",
            "config",
            "run_directory",
            "progress",
            "query_output",
            "query_commands",
        )
    },
    "jobs": {"pipeline.cli"},
}
"""Third-party packages and packages of this project that each may import, besides itself and the standard library."""


def imports(source: Path) -> Iterator[str]:
    """Top-level names of third-party imports, and ``pipeline.x`` for this project's own."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            names = [node.module or ""]
            if node.module == "pipeline":
                names = [f"pipeline.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield ".".join(parts[:2]) if parts[0] == "pipeline" else parts[0]


def sources(name: str) -> list[Path]:
    folder = ROOT / "jobs" if name == "jobs" else PACKAGE / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]


@pytest.mark.parametrize("name", ALLOWED)
def test_a_package_imports_only_what_its_place_in_the_house_allows(name: str) -> None:
    allowed = ALLOWED[name] | {f"pipeline.{name}", "pipeline.errors"} | set(sys.stdlib_module_names)
    found = {(str(path.relative_to(ROOT)), used) for path in sources(name) for used in imports(path)}
    assert found, f"no source found for {name}"
    assert {(path, used) for path, used in found if used not in allowed} == set()


def test_every_module_has_a_rule() -> None:
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert modules - set(ALLOWED) == {"__init__", "stages"}, "stages may import everything but cli"
    assert "pipeline.cli" not in {used for path in sources("stages") for used in imports(path)}


def test_only_runtime_imports_ray_and_only_where_ray_was_chosen() -> None:
    importers = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if "ray" in set(imports(path))}
    assert all(path.startswith("pipeline/runtime/") for path in importers)
    script = (
        "import sys, pipeline, pipeline.stages; from pipeline.runtime.executor import make_executor;"
        "make_executor('serial', address='local', workers=1, cpus_per_worker=1, gpus_per_worker=0, timeout_s=1);"
        "print([name for name in ('ray', 'transformers') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def test_importing_the_package_is_cheap() -> None:
    script = "import sys, pipeline; print([name for name in ('torch', 'ray', 'zarr') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def test_every_error_that_a_user_can_cause_has_one_base() -> None:
    internal = {"WorkerLostError", "HeldError", "_DamagedError"}  # each is caught inside the package
    bases = {
        node.name: {getattr(base, "id", "") for base in node.bases}
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.name not in internal
    }
    known = {"Exception", "NpeffError"}
    while more := {name for name, of in bases.items() if of & (known - {"Exception"})} - known:
        known |= more
    assert set(bases) <= known
