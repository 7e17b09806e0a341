"""Whitened directions of a run: those of their definition, with and without polishing, and what later stages read."""

from __future__ import annotations

from pathlib import Path

import npeff
import numpy as np
import pytest
import torch
import yaml
from end_to_end.test_polish import (
    K,
    N,
    _Interrupted,
    _Stops,
    config_of,
    copy_of,
    dense,
    directions_of,
    narrow,
)
from former_run import unpack
from npeff.cli import main as cli
from npeff.query.components import ComponentStore
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.stage import recorded
from npeff.sketches import make_sketch
from npeff.stages.earlier_results import fingerprint_of
from npeff.stages.lift import LIFT
from npeff.stages.pipeline import export_direction
from npeff.stages.repair.directions import own_directions
from npeff.stages.worker_specs import model_spec
from npeff.store.component_store import open_factorization
from npeff.store.direction_sketches import direction_sketches
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table
from safetensors import safe_open

__all__ = ["narrow"]

DAMPING = 0.03


def whitened(path: Path, run: RunDirectory, **lift: object) -> RunDirectory:
    return copy_of(run, path, **{"direction": "whitened", "damping": DAMPING, **lift})


def definition(own_KP: np.ndarray, factors_NRP: np.ndarray, fit_N: np.ndarray) -> np.ndarray:
    own = own_KP.astype(np.float64)
    gram, products = own @ own.T, factors_NRP[fit_N] @ own.T
    mean = np.einsum("nrk,nrl->kl", products, products) / fit_N.sum()
    found = gram @ np.linalg.inv(mean + DAMPING * mean.diagonal().mean() * gram) @ own
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def fitted(run: RunDirectory) -> np.ndarray:
    table = read_table(run.table("examples"), "examples")
    return (np.asarray(table["split"].to_pylist()) == "fit") & table["valid"].to_numpy()


def column(run: RunDirectory, name: str) -> np.ndarray:
    return np.asarray(read_table(run.table("components"), "components")[name].to_pylist(), dtype=float)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Factorized in all parameters, not lifted."""
    document = config_of(tmp_path_factory.mktemp("whole") / "run", {"kind": "identity"}).model_dump()
    document["fishers"]["store_dtype"] = "float32"
    run = RunDirectory.create(RunConfig.model_validate(document))
    npeff.compute_fishers(run)
    npeff.factorize(run)
    return run


def test_without_a_sketch_they_are_those_of_their_definition(whole: RunDirectory, tmp_path: Path) -> None:
    factors = FisherStore.open(whole.fishers).read_rows(np.arange(N), ("factors",))["factors"].astype(np.float64)
    own_run = RunDirectory.open(whole.path)
    npeff.lift(own_run)
    own = directions_of(own_run)
    expected = definition(own, factors, fitted(whole))
    document = yaml.safe_load(whole.settings.read_text())
    document["lift"] |= {"direction": "whitened", "damping": DAMPING}
    whole.settings.write_text(yaml.safe_dump(document))
    run = RunDirectory.open(whole.path)
    assert recorded(run, LIFT) is None  # another kind of direction is computed again
    npeff.lift(run)
    found = directions_of(run)
    np.testing.assert_allclose(np.linalg.norm(found - expected, axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(column(run, "cosine_own"), (expected * own).sum(1), atol=1e-4)
    assert np.linalg.norm(found - own, axis=1).max() > 0.1
    assert column(run, "lift_cosine").min() > 0.99
    np.testing.assert_allclose(direction_sketches(run), found, atol=1e-5)
    assert npeff.check(run) == []


@pytest.mark.slow
def test_polished_directions_are_whitened_with_products_in_all_parameters(narrow: RunDirectory, tmp_path: Path) -> None:
    factors, _ = dense(narrow, tmp_path)
    own_run = copy_of(narrow, tmp_path / "own", polish_steps=1)
    npeff.lift(own_run)
    own, run = directions_of(own_run), whitened(tmp_path / "run", narrow, polish_steps=1)
    npeff.lift(run, executor=_Stops())
    expected, found = definition(own, factors, fitted(run)), directions_of(run)
    np.testing.assert_allclose(np.linalg.norm(found - expected, axis=1), 0, atol=5e-3)  # fp16 factors
    np.testing.assert_allclose(column(run, "cosine_own"), (expected * own).sum(1), atol=5e-3)
    np.testing.assert_allclose(column(run, "lift_cosine"), column(own_run, "lift_cosine"), atol=1e-5)
    assert not (run.partial_results("lift") / "polish").exists()
    of_repair = own_directions(run)
    assert of_repair is not None
    repaired = of_repair.coefficients_KK @ found  # 48 coordinates determine them less well than all parameters
    assert ((repaired * own).sum(1) / np.linalg.norm(repaired, axis=1)).min() > 0.98
    for units in (3 * K + 1, 4 * K + 1):  # during the last scores, and during whitening
        interrupted = whitened(tmp_path / f"{units}", narrow, polish_steps=1)
        with pytest.raises(_Interrupted):
            npeff.lift(interrupted, executor=_Stops(units + 2))  # the lift has two parts and K directions
        npeff.lift(interrupted, executor=_Stops())
        np.testing.assert_array_equal(directions_of(interrupted), found)


def test_a_later_lift_adds_the_directions_of_a_lift_of_all(narrow: RunDirectory, tmp_path: Path) -> None:
    together, singly = whitened(tmp_path / "together", narrow), whitened(tmp_path / "singly", narrow)
    npeff.lift(together)
    for component in (2, 0, 1):
        npeff.lift(singly.with_config(singly.config.with_lift(components=[component])))
        sketches = direction_sketches(singly)
        assert np.isfinite(sketches[component]).all()
        assert np.isnan(sketches).any() == (component != 1)
    np.testing.assert_allclose(directions_of(singly), directions_of(together), rtol=0, atol=2e-6)


@pytest.mark.parametrize("lift", [{"direction": "own"}, {}, {"polish_steps": 1}], ids=str)
def test_sketches_are_those_of_the_stored_directions(
    lift: dict[str, object], narrow: RunDirectory, tmp_path: Path
) -> None:
    run = whitened(tmp_path / "run", narrow, **lift)
    npeff.lift(run)
    layout = model_spec(run, fingerprint_of(run)).load().layout
    sketch, store = make_sketch(run.config.fishers.sketch, layout, run.config.seed), DirectionStore.open(run.directions)
    directions = [store.read(component) for component in range(K)]
    stacked = {name: torch.from_numpy(np.stack([each[name] for each in directions])) for name in layout.names}
    expected = torch.nn.functional.normalize(sketch.apply_dense(stacked).double()).numpy()
    found = direction_sketches(run)
    assert found.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    cosines = (found * expected).sum(1)
    assert cosines.min() > (0.999999 if "polish_steps" in lift else 0.9)  # rows in 48 coordinates are calibrated


def test_the_kind_of_a_direction_is_stored_and_exported(narrow: RunDirectory, tmp_path: Path) -> None:
    for kind in ("own", "whitened"):
        run = copy_of(narrow, tmp_path / kind, direction=kind)
        assert npeff.lift(run)["direction"] == kind
        export_direction(run, 1, tmp_path / "direction.safetensors")
        with safe_open(tmp_path / "direction.safetensors", "np") as file:
            assert file.metadata() == {"component": "1", "direction": kind}
        assert ComponentStore.open(run.path).direction_store.attrs["direction"] == kind


def test_damaged_combinations_are_said_to_be_so(
    narrow: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whitened(tmp_path / "run", narrow)
    npeff.lift(run.with_config(run.config.with_lift(components=[0])))
    (run.partial_results("lift") / "combinations.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        cli.main(["lift", str(run.path), "--component", "1"])
    assert end.value.code == 2
    assert "combinations.safetensors is missing or damaged: delete it" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_has_own_directions(tmp_path: Path) -> None:
    run = RunDirectory.open(unpack(tmp_path))
    assert run.config.lift.direction == "own"
    assert recorded(run, LIFT) is not None
    components = open_factorization(run.factorization).read_components().astype(np.float64)
    components /= np.linalg.norm(components, axis=1, keepdims=True)
    np.testing.assert_array_equal(direction_sketches(run), components)
    assert column(run, "cosine_own").tolist() == pytest.approx([np.nan] * len(components), nan_ok=True)
