"""Plans: formulas against numbers computed by hand, sizes against those of a run, the command and its page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import npeff
import pytest
import yaml
from benchmarks.solver_stage.cost_model import Machine, Problem, iteration
from in_process import command, refused
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.fishers.estimate import estimate
from npeff.stages.plan import (
    CONSTANTS,
    H200,
    REFERENCES,
    Plan,
    PlanError,
    Workload,
    bucket_bytes,
    collection_seconds,
    compression_seconds,
    model_bytes,
    plan,
    row_sum_seconds,
    sequence_bytes,
    solver_bytes,
    solver_seconds,
    verification_seconds,
)
from npeff.stages.planned import plan_rows, plans

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
SMALL = REFERENCES["8B decoder"]
"""P = 8e9, L = 32, h = 4,096, vocabulary 128,256, T = 512, R = 4, D = 16,384, K = 2,048, N = 100,000, k = 64."""


def test_memory_is_that_computed_by_hand() -> None:
    assert model_bytes(SMALL, 1) == 16e9
    assert model_bytes(SMALL, 4) == 4e9 + 2 * 16e9 / 32
    # of a token: 32 · 4,096 · (34 + 2 · (6.5 + 4 · 10.5)) = 17,170,432 of layers, 4 · 7 · 128,256 = 3,591,168 of logits
    assert sequence_bytes(SMALL) == 512 * (17_170_432 + 3_591_168)
    # 100,000 · 2/3 / 8 = 8,333.3 examples of 2 · 4 · 16,384 + 4 · 2,048 bytes, and 80 · 2,048 · 16,384
    assert solver_bytes(SMALL, 8) == pytest.approx(8_333.333 * 139_264 + 2_684_354_560)
    found = plan(SMALL)
    assert (found.devices, found.devices_per_model) == (8, 1)
    assert found.batch == int((0.9 * 141e9 - 16e9) / sequence_bytes(SMALL)) == 10
    assert found.directions_at_a_time == int((0.9 * 141e9 - 16e9 - sequence_bytes(SMALL)) / 32e9) == 3
    assert found.memory["a batch"] + found.memory["weights"] <= 0.9 * 141e9


def test_seconds_are_those_computed_by_hand() -> None:
    # 5 passes of 2 · 8e9 · 512 = 8.192e12 FLOP, 1.07 of them, at 0.4 · 989e12
    assert collection_seconds(SMALL, H200, 1, 1) == pytest.approx(4.096e13 * 1.07 / 3.956e14)
    # 16 devices fetch 16e9 · 15/16 bytes in 5 passes of a batch of 2, at 0.4 · 50e9 (8 of them: 14e9, at 0.4 · 450e9)
    fetched = collection_seconds(SMALL, H200, 16, 2) - collection_seconds(SMALL, H200, 1, 2)
    assert fetched == pytest.approx(5 * 15e9 / 2e10 / 2)
    fetched = collection_seconds(SMALL, H200, 8, 1) - collection_seconds(SMALL, H200, 1, 1)
    assert fetched == pytest.approx(5 * 14e9 / 1.8e11)
    # Grams of a block: 2 · 512² · 4,096 · 48.5 + 16 · 512 · 4,096 · 10.5 = 1.0450e11; transforms: 12 · 4,096 · 512 · 32
    assert compression_seconds(SMALL, H200) == pytest.approx(
        32 * (1.04505e11 / 2.68e13 + 805_306_368 / 1.92e12), rel=1e-4
    )
    # of 8,192 tokens, formed rows are cheaper: 2 · 4 · 8,192 · 2.5e8 + 2 · 16 · 2.5e8 = 1.6392e13
    assert compression_seconds(replace(SMALL, length=8192), H200) == pytest.approx(
        32 * (1.6392e13 / 2.68e13 + 16 * 805_306_368 / 1.92e12), rel=1e-4
    )
    # 3 blocks form rows, 2 · 4 · 512 · 8e9 FLOP each, and 64 directions take 2 · 4 · 8e9 each, at 0.4 · 67e12
    assert row_sum_seconds(SMALL, H200, 3) == pytest.approx((3 * 3.2768e13 + 64 * 6.4e10) / 2.68e13)
    # 64 · 228 · 4 = 58,368 forward passes of 8.192e12 FLOP, and 64 directions of 16e9 bytes at 1e9 a second
    assert verification_seconds(SMALL, H200, 1, 1) == pytest.approx(1024 + 58_368 * 8.192e12 / 3.956e14)


def seconds(found: Plan, stage: str) -> float:
    hours = found.hours[stage]
    assert hours is not None
    return 3600 * hours


def test_hours_are_sums_of_the_terms() -> None:
    found, fitted = plan(SMALL), 200_000 / 3
    fisher = collection_seconds(SMALL, H200, 1, 10) + compression_seconds(SMALL, H200)
    stored = bucket_bytes(SMALL)
    assert seconds(found, "fishers") == pytest.approx(16 + (100_000 * fisher + stored["fishers"] / 1e9) / 8)
    lifted = 22 * collection_seconds(SMALL, H200, 1, 1) + row_sum_seconds(SMALL, H200, 22)  # 64 directions, 3 at a time
    assert seconds(found, "lift") == pytest.approx(16 + (fitted * lifted + stored["directions"] / 1e9) / 8)
    # 400,000 rows of 16,384² products at 1.669e-11 s, and 11 matrices of 16,384³ at 1.098e-10 s
    assert seconds(found, "spectrum") == pytest.approx(400_000 * 2**28 * 1.669e-11 / 8 + 11 * 2**42 * 1.098e-10, 1e-3)


def test_in_the_lift_one_device_of_each_group_computes_and_holds_the_directions() -> None:
    work = replace(REFERENCES["70B decoder"], explained=1e9)
    found = plan(work, replace(H200, devices=16, devices_per_model=8))
    free = 0.9 * 141e9 - 141.2e9 / 8 - 2 * 141.2e9 / 80 - sequence_bytes(work)
    assert found.directions_at_a_time == int(free / 4e9) == 14
    blocks = 5  # of 64 directions, 14 at a time
    collect, fitted = collection_seconds(work, H200, 8, 1), 200_000 / 3
    lifted = fitted * (blocks * collect + row_sum_seconds(work, H200, blocks)) + bucket_bytes(work)["directions"] / 1e9
    assert seconds(found, "lift") == pytest.approx(141.2 + lifted / 2)


def test_the_devices_that_share_a_model_are_chosen_by_the_hours() -> None:
    work = replace(REFERENCES["70B decoder"], explained=1e9)
    hours = {}
    for g in (2, 4, 8, 16):
        found = plan(work, replace(H200, devices=64, devices_per_model=g))
        hours[g] = sum(seconds(found, stage) for stage in found.hours)
    assert plan(work, replace(H200, devices=64)).devices_per_model == min(hours, key=hours.__getitem__)
    whole = plan(REFERENCES["70B decoder"])
    assert whole.directions_at_a_time == 0, "a direction has 282 GB"
    assert [stage for stage, each in whole.hours.items() if each is None] == ["lift", "verify", "attribute"]


def test_the_solver_takes_the_time_of_the_cost_model_of_the_benchmarks() -> None:
    on = replace(H200, utilisation=0.6)
    machine = Machine("", 8, 0.6 * 989e12 / 2, 0.6 * 67e12, 0.6 * 4.8e12, 0.6 * 67e12, 0.6 * 450e9, 2, accelerated=True)
    terms = iteration(Problem(66_667, 4, 16_384, 2_048), machine)
    per_example = (terms["products"] + terms["coefficients"]) / (66_667 / 8)
    in_passes = 60 * 200_000 / 3 / 8 + 80 * 2048 + 60 * 4096  # the fit, four starts of 20 passes, two refits of halves
    steps = 60 + 80 + 120
    expected = in_passes * per_example + 60 * terms["all-reduce"] + steps * terms["step"]
    assert solver_seconds(SMALL, on, 8) == pytest.approx(expected, rel=1e-3)


def test_twice_the_devices_take_half_of_the_time_and_longer_texts_take_more() -> None:
    few, many = plan(SMALL, replace(H200, devices=8)), plan(SMALL, replace(H200, devices=16))
    for stage in ("fishers", "lift"):
        assert seconds(many, stage) == pytest.approx(seconds(few, stage) / 2, rel=0.02)
    longer = plan(replace(SMALL, length=1024))
    assert all(seconds(longer, stage) > 1.8 * seconds(few, stage) for stage in ("fishers", "lift"))
    assert longer.hours["factorize"] == few.hours["factorize"]
    assert longer.bucket == few.bucket


def test_the_mixture_computes_with_the_parameters_that_a_token_uses() -> None:
    mixture = REFERENCES["8×22B mixture"]
    dense = replace(mixture, active=mixture.parameters)
    assert collection_seconds(mixture, H200, 1, 1) == pytest.approx(
        39.2 / 140.6 * collection_seconds(dense, H200, 1, 1)
    )
    assert bucket_bytes(mixture) == bucket_bytes(dense)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    config = RunConfig.model_validate(
        {
            "run_dir": str(tmp_path_factory.mktemp("plan") / "run"),
            "task": {"name": "digits", "options": {"limit": 240, "epochs": 1}},
            "parameters": {"exclude": ["*.bias"]},
            "fishers": {"sketch": {"kind": "tensorsketch", "dim": 2048}},
            "factorization": {"n_components": 16, "max_iterations": 3, "n_starts": 1, "stability_examples": 0},
            "lift": {"components": list(range(8))},
            "executor": {"kind": "serial"},
        }
    )
    run = RunDirectory.create(config)
    npeff.compute_fishers(run)
    npeff.factorize(run)
    npeff.lift(run)
    return run


def on_disk(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def test_bytes_are_those_of_a_run(run: RunDirectory) -> None:
    found = estimate(run.config)
    facts = found.trial.facts
    work = Workload(
        *(facts.layout.size, facts.layout.size, 3, 64, 10),
        examples=facts.n_examples,
        rank=facts.rank,
        dim=facts.sketch_dim,
        components=16,
        lifted=8,
        direction_bytes=4,
    )
    stored = bucket_bytes(work)
    assert stored["fishers"] == pytest.approx(found.store_bytes, rel=0.01)
    assert stored["fishers"] == pytest.approx(on_disk(run.fishers), rel=0.03)
    assert stored["directions"] == pytest.approx(found.direction_bytes + 8 * 4 * facts.sketch_dim)
    assert stored["directions"] == pytest.approx(on_disk(run.directions), rel=0.03)
    assert stored["factorization"] == pytest.approx(on_disk(run.factorization), rel=0.05)


def test_a_run_file_gives_its_numbers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")
    from tasks import tiny
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = MixtralConfig(num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=1, **sizes, **tiny.SIZE)
    model = tiny.save_model(tmp_path / "model", AutoModelForCausalLM, config)
    options = {"model": str(tmp_path / "model"), "dtype": "bfloat16", "text_column": "text", "max_length": 40}
    options["data"] = tiny.write(tmp_path / "data.parquet", {"text": ["a small cat"] * 70})
    content: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "task": {"name": "huggingface-causal-lm", "options": options},
        "parameters": {"exclude": ["*embed*", "*lm_head*"]},
        "fishers": {"labels": "sampled", "rank": 3, "sketch": {"dim": 256}},
        "factorization": {"n_components": 8},
        "lift": {"components": [0, 5], "dtype": "float16"},
    }
    run_config = RunConfig.model_validate(content)
    total = sum(value.numel() for value in model.parameters())
    tables = 2 * 16 * tiny.SIZE["vocab_size"]
    experts = 2 * 4 * 3 * 16 * 24
    expected = Workload(
        *(total, total - 0.75 * experts, 2, 16, tiny.SIZE["vocab_size"]),
        explained=total - tables,
        examples=70,
        length=40,
        rank=3,
        dim=256,
        components=8,
        lifted=2,
        weight_bytes=2,
        direction_bytes=2,
    )
    assert plans(run_config, {}) == {"run": plan(expected)}
    given = {"examples": 500.0, "devices": 16.0}
    assert plans(run_config, given) == {"run": plan(replace(expected, examples=500), replace(H200, devices=16))}
    assert not (tmp_path / "run").exists()
    content["task"]["options"]["adapter"] = "an-adapter"
    with pytest.raises(PlanError, match="explained is not known: give --assume explained=NUMBER"):
        plans(RunConfig.model_validate(content), {})
    content["fishers"] = {}
    with pytest.raises(PlanError, match="rank is not known: give --assume rank=NUMBER"):
        plans(RunConfig.model_validate(content), {"explained": 100.0})


def test_the_command_prints_the_plan_as_a_table_and_as_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert command("estimate", "--plan") == 0
    out = capfd.readouterr().out
    assert all(re.search(rf"│ {re.escape(row[0])} +│ {row[1]} +│", out) for row in plan_rows(plans(None, {})))
    assert all(row[2] in out for row in CONSTANTS)
    assumed = ["--assume", "parameters=8e9", "--assume", "layers=32", "--assume", "width=4096"]
    assumed += ["--assume", "vocabulary=128,256", "--assume", "memory=80e9"]
    assert command("estimate", "--plan", *assumed, "--format", "json") == 0
    found = json.loads(capfd.readouterr().out)
    expected = plan(SMALL, replace(H200, memory=80e9))
    assert found["plans"] == {"model": json.loads(json.dumps(vars(expected)))}
    (memory,) = (row for row in found["constants"] if row["name"] == "memory")
    assert (memory["value"], memory["kind"]) == ("8e+10", "given")
    (run_file := tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"run_dir": "runs/x", "task": {"name": "digits"}, "factorization": {"n_components": 4}})
    )
    assert "the plan needs parameters" in refused(capfd, "estimate", run_file, "--plan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a run file is missing: give RUN, or --plan"),
        (["RUN.yaml", "--assume", "devices=8"], "--assume and --format need --plan"),
        (
            ["--plan", "--assume", "device=8"],
            "unknown number 'device' (did you mean 'devices'?): give one of parameters",
        ),
        (["--plan", "--assume", "devices"], "--assume 'devices' is not NAME=NUMBER: write it like devices=64"),
        (["--plan", "--assume", "rank=0"], "rank must be above 0, not 0: give --assume rank=NUMBER"),
        (["--plan", "--assume", "parameters=1e9"], "the plan needs layers, width, vocabulary: give --assume layers="),
        (["--plan", "--assume", "lifted=4000"], "lifted must be at most components: give a smaller lifted"),
        (["--plan", "--assume", "devices=9"], "9 devices are not groups of 2, which share a model: give a multiple"),
        (["--plan", "--assume", "length=100000"], "each of 4,096 devices needs 2,"),
        (["--plan", "--format", "csv"], "a plan has no format csv: use table or json"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capfd, "estimate", *arguments)


def markdown(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_tables_of_the_page_are_those_of_the_command() -> None:
    commands = re.findall(r"^npeff estimate --plan(.*)$", PAGE, re.MULTILINE)
    tables = re.findall(r"^\| plan \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    given = [dict(re.findall(r"--assume (\w+)=(\S+)", each)) for each in commands[:2]]
    assert len(tables) == 2
    assert given[0] == {}
    assert set(given[1]) == {"explained", "devices"}
    for table, numbers in zip(tables, given, strict=True):
        assert table.strip() == markdown(plan_rows(plans(None, {name: float(each) for name, each in numbers.items()})))
    for row in CONSTANTS:
        assert markdown([row]) in PAGE
