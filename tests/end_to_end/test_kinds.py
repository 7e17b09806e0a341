"""Every kind whose components are in the sketch, through all stages on one Fisher store, and queries by evidence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import torch
from end_to_end.nan_digits import DAMAGED
from in_process import command, refused
from npeff.errors import NpeffError
from npeff.factorization import InvalidProblemError
from npeff.factorization.direct import random_components
from npeff.factorization.nnls import nnls
from npeff.fisher import prediction_gradients
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.fitted_examples import largest_probabilities
from npeff.stages.status import status
from npeff.store.component_store import open_factorization, write_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table
from planted import planted_fishers
from planted_run import planted_run
from pydantic import ValidationError

N, K = 120, 3
KINDS = ("fishers", "gradients", "squared", "kmeans", "pca", "random")
WHOLE = ("fishers", "gradients", "kmeans")
"""Kinds for which `npeff run` is run to the end. The others are run as far as the verification; see the slow test."""


def config_of(path: Path, kind: str, name: str | None = None, **factorization: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": str(path),
            "task": {"name": "end_to_end.nan_digits:NanDigits", "options": {"limit": N, "epochs": 2}},
            "fishers": {"sketch": {"dim": 64}, "shard_size": 30, "store_dtype": "float32"},
            "factorization": {
                "name": name or kind,
                "n_components": K,
                "kind": kind,
                "stability_examples": 0,
                "max_iterations": 30,
                **factorization,
            },
            "verification": {
                "top_examples": 8,
                "baseline_examples": 20,
                "epsilon": 0.1,
                "selectivity_examples": 0,
                "correlation_examples": 0,
            },
            "executor": {"kind": "serial"},
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """The verified factorizations of one run, by kind."""
    path = tmp_path_factory.mktemp("kinds") / "run"
    runs = {kind: RunDirectory.create(config_of(path, kind)) for kind in KINDS}
    for kind, run in runs.items():
        for stage in [npeff.run] if kind in WHOLE else [npeff.factorize, npeff.lift, npeff.verify]:
            stage(run)
    return runs


def factors_of(run: RunDirectory) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Stored factors, float64, and the masks of the fitted and of the valid examples."""
    stored = FisherStore.open(run.fishers).read_rows(np.arange(N), ["factors", "valid"])
    fit = np.asarray(read_table(run.table("examples"), "examples")["split"].to_pylist()) == "fit"
    return torch.from_numpy(stored["factors"]).double(), fit & stored["valid"], stored["valid"]


def gradients_of(run: RunDirectory) -> np.ndarray:
    stored = FisherStore.open(run.fishers).read_rows(np.arange(N), ["factors", "logits"])
    return prediction_gradients(torch.from_numpy(stored["factors"]), torch.from_numpy(stored["logits"])).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_completes_and_every_valid_example_has_coefficients_and_evidence(
    kind: str, finished: dict[str, RunDirectory]
) -> None:
    run = finished[kind]
    missing = {row.stage for row in status(run) if row.state != "complete"}
    assert missing == (set() if kind in WHOLE else {"attribute", "report"})
    assert run.report.is_file() == (kind in WHOLE)
    record = run.record("factorize")
    assert record is not None
    assert record["factorized"] == kind
    assert record["explained_held_out"] <= record["explained"] + 0.2 <= 1.2
    stored = open_factorization(run.factorization)
    h, w, e = stored.read_components(), stored.read_coefficients(), stored.read_evidence()
    factors, _, valid = factors_of(run)
    assert e is not None
    for array in (w, e):
        assert array.shape == (N, K)
        assert np.isnan(array[~valid]).all()
        assert (array[valid] >= 0).all()
    assert np.isnan(w[DAMAGED]).all()
    np.testing.assert_allclose(np.linalg.norm(h, axis=1), 1, rtol=1e-9)
    fishers = factors.mT @ factors
    expected = torch.einsum("kd,nde,ke->nk", torch.from_numpy(h), fishers, torch.from_numpy(h))
    np.testing.assert_allclose(e[valid], expected[valid], rtol=1e-5, atol=1e-9)
    lifted = run.record("lift")
    assert lifted is not None
    assert lifted["n_components"] == K
    for component in range(K):
        direction = DirectionStore.open(run.directions).read(component)
        assert sum(np.square(array).sum() for array in direction.values()) == pytest.approx(1, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WHOLE])
def test_a_run_of_another_kind_ends_with_a_report(kind: str, tmp_path: Path) -> None:
    run = npeff.run(RunDirectory.create(config_of(tmp_path / "run", kind)))
    assert {row.state for row in status(run)} == {"complete"}
    assert f"kind: {kind}" in run.report.read_text(encoding="utf-8")


def test_the_components_and_coefficients_are_those_of_the_definitions(finished: dict[str, RunDirectory]) -> None:
    factors, fit, valid = factors_of(finished["pca"])
    rows = factors[torch.from_numpy(fit)].flatten(0, 1).numpy()
    singular = np.linalg.svd(rows, full_matrices=False)[2][:K]
    found = {kind: open_factorization(run.factorization) for kind, run in finished.items()}
    np.testing.assert_allclose(np.abs(np.einsum("kd,kd->k", found["pca"].read_components(), singular)), 1, atol=1e-8)
    np.testing.assert_array_equal(found["random"].read_components(), random_components(K, 64, seed=0))
    for kind in ("pca", "random"):
        h = torch.from_numpy(found[kind].read_components())
        targets = (factors[torch.from_numpy(valid)] @ h.T).square().sum(1)
        expected = nnls(targets, (h @ h.T).square())
        np.testing.assert_allclose(found[kind].read_coefficients()[valid], expected, rtol=1e-4, atol=1e-6)
    gradients = gradients_of(finished["kmeans"])
    w, h = found["kmeans"].read_coefficients(), found["kmeans"].read_components()
    assert ((w > 0).sum(1)[valid] <= 1).all()
    own = w[valid].argmax(1)
    np.testing.assert_allclose(
        w[valid].max(1), np.einsum("nd,nd->n", gradients[valid], h[own]).clip(0), rtol=1e-4, atol=1e-6
    )
    for component in range(K):  # a centre is the mean of its fitted examples
        mean = gradients[valid & fit & (w[:, component] > 0)].mean(0)
        assert mean @ h[component] / np.linalg.norm(mean) > 0.99


def test_the_factorization_of_gradients_describes_the_gradients(finished: dict[str, RunDirectory]) -> None:
    """The loss of the folded rows bounds that of the gradients themselves."""
    stored, record = open_factorization(finished["gradients"].factorization), finished["gradients"].record("factorize")
    assert record is not None
    _, fit, _ = factors_of(finished["gradients"])
    gradients = gradients_of(finished["gradients"])[fit]
    w = stored.read_coefficients()[fit].astype(np.float64)
    loss = np.square(gradients - w @ stored.read_components()).sum()
    assert loss <= 2 * record["loss"]
    assert (np.diff(np.square(w).sum(0)) <= 0).all()


def test_seeds_decide_and_repeat(finished: dict[str, RunDirectory], tmp_path: Path) -> None:
    for kind in ("kmeans", "squared"):
        path = tmp_path / kind
        shutil.copytree(finished[kind].path, path, ignore=shutil.ignore_patterns("factorizations"))
        again = RunDirectory.create(config_of(path, kind))
        npeff.factorize(again)
        one, other = (open_factorization(run.factorization) for run in (finished[kind], again))
        np.testing.assert_array_equal(one.read_components(), other.read_components())
        np.testing.assert_array_equal(one.read_coefficients(), other.read_coefficients())


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_out_copy_of_a_fitted_example_has_its_coefficients(kind: str, tmp_path: Path) -> None:
    truth = planted_fishers(n_examples=60, rank=2, dim=24, n_components=K, noise=0.2, seed=4, n_active=1)
    doubled = type(truth)(np.repeat(truth.factors_NRD, 2, axis=0), truth.components_KD, truth.coefficients_NK)
    run = planted_run(tmp_path / "run", doubled, shard_size=50, factorization={"kind": kind, "held_out_fraction": 0.5})
    npeff.factorize(run)
    stored = open_factorization(run.factorization)
    fit = np.asarray(read_table(run.table("examples"), "examples")["split"].to_pylist()) == "fit"
    pairs = [pair for pair in range(60) if fit[2 * pair] != fit[2 * pair + 1]]
    assert len(pairs) > 10
    for array in (stored.read_coefficients(), stored.read_evidence()):
        assert array is not None
        pair = np.array(pairs)
        np.testing.assert_allclose(array[2 * pair], array[2 * pair + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gradients", "pca", "squared", "kmeans"])
def test_separate_groups_are_found_by_every_kind(kind: str, tmp_path: Path) -> None:
    truth = planted_fishers(n_examples=300, rank=1, dim=32, n_components=K, noise=0.05, seed=2, n_active=1)
    factors = np.abs(truth.factors_NRD) if kind == "squared" else truth.factors_NRD
    planted = type(truth)(factors, truth.components_KD, truth.coefficients_NK)
    run = planted_run(tmp_path / "run", planted, shard_size=128, factorization={"kind": kind})
    npeff.factorize(run)
    coefficients = open_factorization(run.factorization).read_evidence()
    assert coefficients is not None
    members = truth.coefficients_NK.argmax(1)
    if kind == "pca":  # rotates within the span of the groups
        assert coefficients.sum(1).min() > 0.9
    else:
        assert len(set(zip(coefficients.argmax(1).tolist(), members.tolist(), strict=True))) == K


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "kmeans", "l1": 0.1}, "l1 is not available for kind: kmeans"),
        ({"kind": "pca", "start_from": "runs/x"}, "start_from is not available for kind: pca"),
        ({"kind": "squared", "expand": "runs/x"}, "expand is not available for kind: squared"),
        ({"kind": "gradients", "example_weights": "w"}, "example_weights is not available for kind: gradients"),
        ({"kind": "random", "metrics": "jsonl"}, "metrics is not available for kind: random"),
        ({"kind": "fishers", "examples": "uncertain"}, "examples: uncertain and max_probability need each other"),
        ({"kind": "fishers", "max_probability": 0.9}, "examples: uncertain and max_probability need each other"),
    ],
)
def test_keys_that_a_kind_does_not_support_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_of(Path("runs/x"), name="x", **changes)


def test_what_a_kind_cannot_do_is_refused_in_one_line(
    finished: dict[str, RunDirectory], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    document = config_of(tmp_path / "x", "kmeans").model_dump()
    sampled = document | {"fishers": document["fishers"] | {"labels": "sampled", "rank": 2}}
    with pytest.raises(ValidationError, match=r"kind: kmeans needs fishers.labels: exact or empirical, not sampled"):
        RunConfig.model_validate(sampled)
    with pytest.raises(ValidationError, match=r"polish_steps needs factorization.kind: fishers"):
        RunConfig.model_validate(document | {"lift": {"polish_steps": 1}})
    with pytest.raises(ConfigError, match=r"needs fishers.diagonal.groups: true"):
        finished["pca"].config.with_factorization(kind="diagonal_groups")
    small = finished["kmeans"].config.with_factorization(name="small", n_components=80)
    with pytest.raises(NpeffError, match="n_components=80 exceeds"):
        npeff.factorize(RunDirectory.create(small))
    with pytest.raises(RunDirectoryError, match="are of kind pca"):
        npeff.transform(RunDirectory.create(config_of(tmp_path / "new", "fishers")), finished["pca"])
    assert "factorization.kind: fishers" in refused(capfd, "select", finished["pca"].home)
    assert "must be" in refused(
        capfd, "factorize", finished["pca"].path, "--kind", "nmf", "--name", "x", "--factorization", "pca"
    )


def test_clusters_that_do_not_fit_the_memory_limit_are_refused(tmp_path: Path) -> None:
    truth = planted_fishers(n_examples=300, rank=2, dim=1024, n_components=K, noise=0.1, seed=0, n_active=1)
    run = planted_run(tmp_path / "run", truth, factorization={"kind": "kmeans", "memory_limit_mb": 1})
    with pytest.raises(InvalidProblemError, match=r"set factorization.memory_limit_mb to this or more"):
        npeff.factorize(run)


# --- Uncertain examples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fishers", "kmeans"])
def test_only_uncertain_examples_are_fitted_and_all_get_coefficients(
    kind: str, finished: dict[str, RunDirectory]
) -> None:
    run = finished["fishers"]
    _, fit, valid = factors_of(run)
    examples = read_table(run.table("examples"), "examples")
    logits = np.array(examples["logits"].to_pylist(), dtype=np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True)).max(1)
    np.testing.assert_allclose(largest_probabilities(examples)[valid], p[valid], rtol=1e-12)
    bound = float(np.median(p[fit]))
    config = config_of(run.path, kind, f"uncertain-{kind}", examples="uncertain", max_probability=bound)
    uncertain = RunDirectory.create(config)
    record = npeff.factorize(uncertain)
    assert record["n_fit"] == (fit & (p < bound)).sum()
    assert not np.isnan(open_factorization(uncertain.factorization).read_coefficients()[valid]).any()
    npeff.lift(uncertain)


@pytest.mark.parametrize(("bound", "message"), [(1e-6, "raise max_probability$"), (None, "too few for 60 components")])
def test_too_few_uncertain_examples_are_refused(
    bound: float | None, message: str, finished: dict[str, RunDirectory]
) -> None:
    run = finished["fishers"]
    _, fit, _ = factors_of(run)
    if bound is None:
        bound = float(np.sort(largest_probabilities(read_table(run.table("examples"), "examples"))[fit])[3]) + 1e-9
    config = config_of(
        run.path, "fishers", f"few-{bound < 1e-5}", examples="uncertain", max_probability=bound, n_components=60
    )
    with pytest.raises(InvalidProblemError, match=message):
        npeff.factorize(RunDirectory.create(config))


# --- Queries ----------------------------------------------------------------------------------------------------------


def test_examples_are_ranked_by_evidence(finished: dict[str, RunDirectory]) -> None:
    run = finished["gradients"]
    store = ComponentStore.open(run.path, run.name)
    e = np.asarray(store.evidence)
    top = store.top_examples(1, n=7, by="evidence")
    assert top.column_names[:3] == ["rank", "evidence", "example"]
    order = np.argsort(-np.nan_to_num(e[:, 1]), kind="stable")[:7]
    assert top["example"].to_pylist() == order.tolist()
    np.testing.assert_allclose(top["evidence"].to_numpy(), e[order, 1])
    held_out = store.top_examples(1, n=5, split="held_out", by="evidence")
    assert set(held_out["split"].to_pylist()) == {"held_out"}
    example = int(order[0])
    rows = store.example(example, by="evidence").to_pylist()
    assert [row["evidence"] for row in rows] == sorted(e[example].tolist(), reverse=True)
    assert {row["component"]: row["rank"] for row in rows}[1] == 0
    np.testing.assert_allclose(store.evidence_of(np.asarray(store.components)), e, rtol=1e-5, atol=1e-9)
    with pytest.raises(QueryError, match=r"directions must have the shape \(K, 64\)"):
        store.evidence_of(np.ones((2, 3)))
    with pytest.raises(QueryError, match="by must be one of coefficient, evidence, direction_evidence, not 'mass'"):
        store.top_examples(0, by="mass")  # type: ignore[arg-type]


def test_enrichment_by_evidence_is_that_of_its_top_examples(finished: dict[str, RunDirectory]) -> None:
    run = finished["fishers"]
    store = ComponentStore.open(run.path, run.name)
    _, _, valid = factors_of(run)
    label = np.array(store.table("examples")["label"].to_pylist())
    for by, values in (
        ("evidence", np.asarray(store.evidence)),
        ("direction_evidence", store.direction_evidence),
        ("coefficient", np.asarray(store.coefficients)),
    ):
        rows = store.enriched("label = 3", top=15, by=by).to_pylist()  # type: ignore[arg-type]
        for row in rows:
            own = np.nan_to_num(values[:, row["component"]].astype(np.float64))
            top = np.argsort(-own, kind="stable")[:15]
            top = top[own[top] > 0]
            assert row["n_in_subset"] == (label[top] == 3).sum()
            marked, rest = own[valid & (label == 3)], own[valid & (label != 3)]
            pairs = np.sign(marked[:, None] - rest[None, :])
            assert row["auc"] == pytest.approx((1 + pairs.mean()) / 2, abs=1e-9)
    with pytest.raises(QueryError, match="give top, such as --top 32"):
        store.enriched("label = 3", by="evidence")


@pytest.mark.parametrize("kind", ["fishers", "kmeans"])
def test_the_evidence_of_directions_is_that_of_their_sketches(kind: str, finished: dict[str, RunDirectory]) -> None:
    run = finished[kind]
    store = ComponentStore.open(run.path, run.name)
    factors, _, valid = factors_of(run)
    sketches = DirectionStore.open(run.directions).read_sketches()
    assert sketches is not None
    unit = torch.from_numpy(sketches / np.linalg.norm(sketches, axis=1, keepdims=True)).to(factors)
    expected = (factors @ unit.T).square().sum(1).numpy()
    found = store.direction_evidence
    np.testing.assert_allclose(found[valid], expected[valid], rtol=1e-4, atol=1e-7)
    assert np.isnan(found[~valid]).all()
    top = store.top_examples(1, n=7, by="direction_evidence")
    assert top["example"].to_pylist() == np.argsort(-np.nan_to_num(found[:, 1]), kind="stable")[:7].tolist()
    example = top["example"][0].as_py()
    rows = store.example(example, by="direction_evidence").to_pylist()
    assert [row["direction_evidence"] for row in rows] == sorted(found[example].tolist(), reverse=True)


def test_without_directions_their_evidence_is_refused(
    finished: dict[str, RunDirectory], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished["pca"].path, path := tmp_path / "run")
    shutil.rmtree(path / "factorizations" / "pca" / "directions.zarr")
    line = refused(capfd, "query", path, "top", "-c", "0", "--by", "direction_evidence", "--factorization", "pca")
    assert "npeff lift" in line


def test_evidence_of_an_earlier_version_is_computed_from_the_fishers(
    finished: dict[str, RunDirectory], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished["pca"].path, path := tmp_path / "run")
    stored = ComponentStore.open(path, "pca")
    expected = stored.top_examples(0, n=5, by="evidence").to_pylist()
    whole = open_factorization(stored.run.factorization)
    kept = {name: value for name, value in whole.attrs.items() if name in ("lineage", "explained")}
    write_factorization(stored.run.factorization, whole.read_components(), whole.read_coefficients(), kept)
    old = ComponentStore.open(path, "pca")
    found = old.top_examples(0, n=5, by="evidence").to_pylist()
    assert [row["example"] for row in found] == [row["example"] for row in expected]
    np.testing.assert_allclose([row["evidence"] for row in found], [row["evidence"] for row in expected], rtol=1e-5)
    assert np.asarray(old.evidence).shape == (N, K)
    shutil.rmtree(path / "fishers.zarr")
    line = refused(capfd, "query", path, "top", "-c", "0", "--by", "evidence", "--factorization", "pca")
    assert "the evidence is computed from the Fishers, which cannot be read" in line


def test_the_command_compares_all_factorizations_of_a_run(
    finished: dict[str, RunDirectory], capfd: pytest.CaptureFixture[str]
) -> None:
    path = finished["fishers"].path
    table = npeff.compare_factorizations(path)
    rows = [row for row in table.to_pylist() if row["factorization"] in KINDS]
    assert {row["factorization"]: row["kind"] for row in rows} == {kind: kind for kind in KINDS}
    summary = ComponentStore.open(path, "pca").summary()["verification"]
    expected = [scores for scores in summary if scores["examples"] == "held_out"]
    own = [row for row in rows if row["factorization"] == "pca"]
    assert [{name: row[name] for name in scores} for row, scores in zip(own, expected, strict=True)] == expected
    assert command("compare", path, "--format", "json") == 0
    assert '"kmeans"' in capfd.readouterr().out
    for row in rows:
        if row["median_kl_ratio"] is not None:
            assert row["median_kl_ratio_low"] <= row["median_kl_ratio"] <= row["median_kl_ratio_high"]
    assert "give one run, two runs" in refused(capfd, "compare", path, "--factorization", "pca")


def test_a_page_shows_the_ratios_of_all_factorizations(
    finished: dict[str, RunDirectory], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, page = finished["fishers"].path, tmp_path / "compare.html"
    assert command("compare", path, "--page", page) == 0
    shown = capfd.readouterr()
    assert "compare.html" in shown.err
    assert "compare.html" not in shown.out
    content = page.read_text()
    verified = read_table(finished["pca"].table("verification"), "verification").to_pylist()
    counted = [row for row in verified if row["examples"] == "held_out" and row["informative"]]
    assert content.count("<title>pca, component ") == sum(row["kl_ratio_matched"] is not None for row in counted)
    assert all(f'<th scope="row">{kind}</th>' in content for kind in KINDS)
    assert "<script" not in content
    report = finished["gradients"].report
    if report.is_file():
        assert 'id="comparison"' in npeff.report(finished["gradients"]).read_text()
    line = refused(capfd, "compare", path, "--factorization", "pca", "--factorization", "kmeans", "--page", page)
    assert "--page shows all factorizations of one run" in line


def test_fewer_than_two_verified_factorizations_have_no_page(
    finished: dict[str, RunDirectory], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished["fishers"].path, path := tmp_path / "run")
    for kind in KINDS[1:]:
        npeff.remove_factorization(path, kind)
    line = refused(capfd, "compare", path, "--page", tmp_path / "compare.html")
    assert "fewer than two factorizations" in line
    assert not (tmp_path / "compare.html").exists()


def test_components_of_two_kinds_are_matched(finished: dict[str, RunDirectory]) -> None:
    path = finished["fishers"].path
    table = npeff.compare(ComponentStore.open(path, "fishers"), ComponentStore.open(path, "kmeans"))
    assert len(table) == K
    assert all(cosine is not None for cosine in table["direction_cosine"].to_pylist())


def test_check_verifies_the_evidence(finished: dict[str, RunDirectory], tmp_path: Path) -> None:
    shutil.copytree(finished["squared"].path, path := tmp_path / "run")
    home = path / "factorizations" / "squared" / "factorization.zarr" / "evidence"
    chunk = next(file for file in home.rglob("*") if file.is_file() and file.name != "zarr.json")
    chunk.unlink()
    run = RunDirectory.open(path, "squared")
    assert [damage.where.name for damage in npeff.check(run, factorization="squared")] == ["factorization.zarr"]
    with pytest.raises(QueryError, match=r"evidence of .* corrupt"):
        ComponentStore.open(path, "squared").top_examples(0, by="evidence")
