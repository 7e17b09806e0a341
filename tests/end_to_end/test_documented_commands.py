"""Every command of README.md and docs/*.md, in the order of its page, on runs of seconds in place of those of the page.

What is replaced is in `SMALLER`; a cluster's job server is a stub, which `test_jobs.py` has in earnest.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
import yaml
from npeff.cli import demo_command, job_commands
from npeff.cli.main import main
from npeff.execution.ray.jobs import Job, Submission
from npeff.perception.difference_scaling import answer_probability, triplets
from npeff.tasks import load_task
from tasks import tiny
from test_documents import PAGES, ROOT, blocks, commands

pytestmark = pytest.mark.process

SMALL = {
    "task": {"name": "digits", "options": {"limit": 60, "epochs": 3}},
    "fishers": {"sketch": {"dim": 128}, "shard_size": 30},
    "factorization": {"n_components": 6, "max_iterations": 10, "stability_examples": 0},
    "verification": {"top_examples": 4, "baseline_examples": 8, "correlation_examples": 8, "epsilon": 0.1},
    "scale": {"pairs": 3, "points": 8},
    "repair": {"kl_steps": [0.1], "joint_passes": 2},
    "step": {"kl_steps": [0.1], "tolerance": 0.1},
    "executor": {"kind": "serial"},
}
SMALLER = {
    "RUN": "RUN.yaml",
    "RUN_DIR": "runs/own",
    "8:64:8": "2:4:2",  # components to try
    "--workers 4": "--workers 1",
    "--components 32": "--components 6",
    "--components 48": "--components 4",
    "--components 12": "--components 3",
    "digit-0003": "digit-0514",  # which is among the first
}
IN_MANY_WORDS = [(old.split(), new.split()) for old, new in SMALLER.items()]

SHARED = Path(os.environ.get("NPEFF_SHARED_DATA", ""))
PAIRS = SHARED / "data/sick/SICK_test_annotated.txt"
has_pairs = "NPEFF_SHARED_DATA" in os.environ and (SHARED / "models/minilm-sick").is_dir() and PAIRS.is_file()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: run files, finished runs, a package, a file of Fishers."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("data", "my_package", "jobs"):
        (folder / name).mkdir()
    (folder / "requirements.txt").write_text("timm==1.0.20\n")
    shown, rng = np.repeat(triplets(5), 8, axis=0), np.random.default_rng(0)
    answered = rng.random(len(shown)) < answer_probability(np.linspace(0, 1, 5) ** 2, 0.2, shown)
    lines = [",".join(map(str, (*triplet, int(answer)))) for triplet, answer in zip(shown, answered, strict=True)]
    (folder / "answers.csv").write_text("\n".join(["i,j,k,response", *lines]))
    (folder / "names.csv").write_text("component,name,note\n0,loops,\n")
    pq.write_table(pa.table({"example": [0, 1, 2], "label": [1, 2, 3]}), folder / "labels.parquet")
    other = {**SMALL, "task": {"name": "digits", "options": {"limit": 30, "epochs": 3}}, "run_dir": "runs/new"}
    for name, document in {
        "jobs/quickstart.yaml": {**SMALL, "run_dir": "runs/digits"},
        "RUN.yaml": {**SMALL, "run_dir": "runs/own", "verification": SMALL["verification"] | {"joint_ablation": 2}},
        "NEW.yaml": other,
    }.items():
        (folder / name).write_text(yaml.safe_dump(document))
    own_model(folder)
    for name, text in zip(("plain.yaml", "share.yaml"), blocks("yaml", PAGES["docs/training.md"]), strict=True):
        document = yaml.safe_load(text)
        document["task"].setdefault("options", {}).update(SMALL["task"]["options"])
        (folder / name).write_text(yaml.safe_dump(SMALL | document | {"factorization": SMALL["factorization"]}))
    shutil.copy(ROOT / "jobs/sst2-on-gpus.yaml", folder / "jobs")
    if has_pairs:
        document = yaml.safe_load((ROOT / "jobs/minilm-sick.yaml").read_text())
        document["task"]["options"]["limit"] = 24
        document |= {name: document.get(name, {}) | SMALL[name] for name in SMALL if name not in ("task", "executor")}
        document |= {"executor": SMALL["executor"], "parameters": {"include": ["bert.pooler.*", "classifier.*"]}}
        (folder / "jobs/minilm-sick.yaml").write_text(yaml.safe_dump(document))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            ["run", "jobs/quickstart.yaml"],
            ["run", "RUN.yaml"],
            ["spectrum", "runs/digits"],
            ["select", "jobs/quickstart.yaml", "--components", "2,3", "--seeds", "2"],
            ["export", "runs/digits", "pefs.h5", "--values", "64"],
            ["export", "runs/digits", "decomposition.h5", "--what", "factorization"],
        ):
            assert code_of(words) == 0, words
    shutil.copytree(folder / "runs/digits", folder / "runs/b")
    return folder


def own_model(folder: Path) -> None:
    """A tiny classifier of texts, and texts."""
    tiny.save_tokenizer(folder / "my-model")
    config = transformers.BertConfig(
        **tiny.SIZE, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    tiny.save_model(folder / "my-model", transformers.AutoModelForSequenceClassification, config)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(tiny.WORDS[:8], 5)) for _ in range(60)]
    rows = [f"{text},{label}" for text, label in zip(texts, rng.integers(0, 2, 60), strict=True)]
    (folder / "reviews.csv").write_text("\n".join(["review,label", *rows]))


class StubServer:
    """Takes every job, and says that it has succeeded."""

    sent: list[Submission] = []  # noqa: RUF012

    def __init__(self, address: str) -> None:
        self.address = address

    def submit(self, submission: Submission) -> tuple[Job, bool]:
        self.sent.append(submission)
        return self.job("npeff-1"), True

    def job(self, job_id: str) -> Job:
        return Job(job_id, "SUCCEEDED", 0.0, 0, "", "")

    def latest(self, run_dir: str) -> Job:
        return self.job("npeff-1")

    def last_line(self, job_id: str) -> str:
        return "report: it is written"

    def follow(self, job_id: str, say: Any) -> Job:
        say("fishers: 2/2 shards\n")
        return self.job(job_id)


def code_of(words: list[str]) -> int | str:
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code or 0


def replaced(words: list[str]) -> list[str]:
    for old, new in IN_MANY_WORDS:
        for place in range(len(words) - len(old) + 1):
            if words[place : place + len(old)] == old:
                words = [*words[:place], *new, *words[place + len(old) :]]
    return words


def serve_and_interrupt(words: list[str]) -> int:
    """Its exit code, once it has said where it serves and was told to end."""
    port = [] if "--port" in words else ["--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "npeff", *words, *port],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    assert process.stdout is not None
    assert any("http://127.0.0.1:" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if "minilm" in page else ())
        for page in PAGES
        if commands("npeff", PAGES[page])
    ],
)
def test_every_command_of_the_page_does_its_work(
    page: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if "minilm" in page and not has_pairs:
        pytest.skip("NPEFF_SHARED_DATA names no folder with models/minilm-sick and data/sick/SICK_test_annotated.txt")
    shutil.copytree(workplace, tmp_path / "of this page")
    monkeypatch.chdir(tmp_path / "of this page")
    monkeypatch.setattr(job_commands, "JobServer", StubServer)
    monkeypatch.setattr("npeff.interchange.push.push_bundle", lambda *_, **__: "https://a-hub.example")
    monkeypatch.setattr(demo_command, "QUICKSTART", Path("jobs/quickstart.yaml"))
    for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "NPEFF_BUCKET"):
        monkeypatch.setenv(name, "given")
    for words in map(replaced, commands("npeff", PAGES[page])):
        code = serve_and_interrupt(words) if "--serve" in words else code_of(words)
        out, err = capfd.readouterr()
        assert code == 0, (" ".join(words), err[-2000:])
        assert words[0] not in ("query", "status", "submit") or "--output" in words or out.strip(), words


def test_what_is_replaced_is_on_a_page(tmp_path: Path) -> None:
    assert "digit-0003" in load_task("digits", {}).examples(tmp_path).table()["id"].to_pylist()
    shown = [" ".join(words) for page in PAGES for words in commands("npeff", PAGES[page])]
    for old in SMALLER:
        assert any(re.search(rf"(^| ){re.escape(old)}( |$)", line) for line in shown), old
