"""The run as a Ray job, on a local `ray start --head`: `npeff submit`, plain `ray job submit`, one job per stage."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from end_to_end import job_faults, kills, run_contents
from end_to_end.local_head import LocalHead, free_ports, write_run_file
from end_to_end.test_secrets import TOKEN, files_with
from places import place

STAGES = ("fishers", "factorize", "lift", "verify")
pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]  # a minute or two on two free cores


@pytest.fixture(scope="module")
def head() -> Iterator[LocalHead]:
    with LocalHead(NPEFF_TEST_TOKEN=TOKEN) as head:
        yield head


def complete_stages(run: Path) -> set[str]:
    return {stage for stage in STAGES if (run / place(f"stages/{stage}.json")).exists()}


@pytest.fixture(scope="module")
def undisturbed(head: LocalHead, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that was submitted from its own folder, and its log as it followed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_contents.write_run_file(folder / "run.yaml", workers=1)
    submit = ("npeff", "submit", "run.yaml", "--run-dir", "relative/run")
    done = head.command(*submit, "--address", head.address, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "relative/run", done.stdout


def test_npeff_submit_runs_everything_from_anywhere_and_follows(undisturbed: tuple[Path, str]) -> None:
    run, log = undisturbed
    assert f"fishers: {run_contents.N_SHARDS}/{run_contents.N_SHARDS} shards" in log
    assert f"report: {run / place('report/index.html')}" in log
    assert complete_stages(run) == set(STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("submitter", ["npeff", "ray"])
def test_a_finished_run_is_not_repeated(submitter: str, head: LocalHead, undisturbed: tuple[Path, str]) -> None:
    run, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in run.rglob("stages/*.json")}
    job = job_faults.submit(submitter, head, run.parents[1] / "run.yaml", run)
    assert job_faults.wait_for_end(head, job) == "SUCCEEDED"
    assert f"report: {run / place('report/index.html')}" in job_faults.log(head, job)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("stages/*.json")} == before


@pytest.mark.slow
def test_the_stages_are_jobs_of_their_own(head: LocalHead, tmp_path: Path) -> None:
    config = write_run_file(tmp_path)
    commands = [f"python jobs/run.py {stage} {config}" for stage in (*STAGES, "report")]
    job = ("ray", "job", "submit", "--address", head.address, "--")
    done = head.command(*job, "sh", "-c", " && ".join(commands))
    assert done.returncode == 0, done.stdout + done.stderr
    assert complete_stages(tmp_path / "run") == set(STAGES)
    assert (tmp_path / "run" / place("report/index.html")).exists()


def test_the_exit_code_is_the_runs_and_the_line_that_says_why_is_in_the_log(head: LocalHead, tmp_path: Path) -> None:
    config = write_run_file(tmp_path, run_dir=str(tmp_path / "run.yaml" / "below-a-file"))
    sent = ("NPEFF_GIVEN=a value", "PATH")
    folder = tmp_path / "working"
    folder.mkdir()
    options = [*(word for text in sent for word in ("--env", text)), "--working-dir", folder]
    reserved = ("--entrypoint-num-cpus", "0.5", "--entrypoint-memory", "1000000", "--entrypoint-num-gpus", "0")
    failed = head.command("npeff", "submit", config, "--address", head.address, *options, *reserved)
    assert failed.returncode == 2
    assert "npeff: error: cannot write to" in failed.stdout
    assert "Traceback" not in failed.stdout + failed.stderr
    job = job_faults.details(head, failed.stdout.split()[1])
    assert job["runtime_env"]["env_vars"]["NPEFF_GIVEN"] == "a value"
    assert job["runtime_env"]["env_vars"]["PATH"] == head.environment["PATH"]
    assert job["metadata"]["npeff_run_dir"] == str(tmp_path / "run.yaml" / "below-a-file")


def submitted_with_token(
    head: LocalHead, folder: Path, name: str, value: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Submit a run whose task needs the value of a variable, from a machine that does not have this variable."""
    working = folder / "working"
    working.mkdir(exist_ok=True)
    for module in ("token_task.py", "defective_tasks.py"):
        shutil.copy(Path(__file__).parents[1] / module, working)
    digest = hashlib.sha256(value.encode()).hexdigest()
    task = {"name": "token_task:TokenTask", "options": {"token": f"${{{name}}}", "digest": digest}}
    config = write_run_file(folder, task=task, fishers={"sketch": {"kind": "identity"}, "shard_size": 20})
    return head.command("npeff", "submit", config, "--address", head.address, "--working-dir", working, *options)


@pytest.mark.slow
def test_a_secret_of_the_cluster_reaches_the_task_and_nothing_that_is_written(head: LocalHead, tmp_path: Path) -> None:
    done = submitted_with_token(head, tmp_path, "NPEFF_TEST_TOKEN", TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert complete_stages(tmp_path / "run") == set(STAGES)
    job = done.stdout.split()[1]
    details = job_faults.details(head, job)
    assert "token: ${NPEFF_TEST_TOKEN}" in details["entrypoint"]
    assert set(details["runtime_env"]["env_vars"]) <= {"RAY_JOB_STOP_WAIT_TIME_S"}, "no variable is forwarded unasked"
    for folder in (tmp_path / "run", head.folder):
        assert files_with(TOKEN, folder) == []
    tasks = head.get("/api/v0/tasks?detail=true&limit=10000").decode()
    assert "WorkerActor.call" in tasks
    shown = (json.dumps(details), job_faults.log(head, job), done.stdout + done.stderr, tasks)
    assert not any(TOKEN in text for text in shown)


@pytest.mark.slow
def test_a_variable_that_the_cluster_lacks_is_named_by_the_job(head: LocalHead, tmp_path: Path) -> None:
    value = f"forwarded-{TOKEN[::-1]}"
    refused = submitted_with_token(head, tmp_path, "NPEFF_TEST_ABSENT", value)
    assert refused.returncode == 2
    (line,) = [line for line in refused.stdout.splitlines() if "npeff: error: " in line]
    assert "task.options.token needs the environment variable NPEFF_TEST_ABSENT, which is not set on " in line
    assert "Traceback" not in refused.stdout + refused.stderr
    given = ("--env", f"NPEFF_TEST_ABSENT={value}")
    forwarded = submitted_with_token(head, tmp_path, "NPEFF_TEST_ABSENT", value, *given)
    assert forwarded.returncode == 0, forwarded.stdout + forwarded.stderr
    assert files_with(value, tmp_path / "run") == []
    environment = job_faults.details(head, forwarded.stdout.split()[1])["runtime_env"]["env_vars"]
    assert environment["NPEFF_TEST_ABSENT"] == value, "the runtime environment shows what was forwarded"
    assert any("runtime_env_agent" in name for name in files_with(value, head.folder)), "and Ray's logs do"


@pytest.mark.slow
def test_a_run_goes_on_after_the_driver_a_worker_and_the_head_were_killed(head: LocalHead, tmp_path: Path) -> None:
    reference = kills.reference_run(tmp_path)
    run, config = tmp_path / "chain", run_contents.write_run_file(tmp_path / "run.yaml")
    job = job_faults.submit("npeff", head, config, run)
    job_faults.wait_for_units(head, job, run, "fishers", 3)
    job_faults.strike(head, "driver")
    shards = run_contents.units_done(run, "fishers")
    assert job_faults.wait_for_end(head, job) == "FAILED"
    assert job_faults.details(head, job)["driver_exit_code"] in (-9, 137)

    second = job_faults.submit("npeff", head, config, run)
    assert second == job.removesuffix("1") + "2"
    job_faults.wait_for_units(head, second, run, "factorize", 4)
    assert {name: run_contents.units_done(run, "fishers").get(name) for name in shards} == shards
    job_faults.strike(head, "worker")
    job_faults.wait_for_units(head, second, run, "verify", 2)
    assert "restarting the workers from iteration" in job_faults.log(head, second), "the job goes on by itself"
    measured = metrics(head, 'stage="factorize"')
    assert measured["ray_npeff_stage_done"] == measured["ray_npeff_stage_total"] == run_contents.LAST_STEP
    assert 0 < measured["ray_npeff_explained"] < 1
    assert measured["ray_npeff_loss"] > 0
    job_faults.strike(head, "head")
    components = run_contents.units_done(run, "verify")
    assert json.loads(head.get("/api/jobs/")) == [], "a new head knows nothing of the old one's jobs"

    third = job_faults.submit("ray", head, config, run)
    assert job_faults.wait_for_end(head, third) == "SUCCEEDED", job_faults.log(head, third)
    assert {name: run_contents.units_done(run, "verify").get(name) for name in components} == components
    assert run_contents.differences(run, reference) == []


@pytest.mark.slow
def test_a_run_has_one_job_at_a_time_which_is_followed_stopped_and_resumed(head: LocalHead, tmp_path: Path) -> None:
    many_shards = {"task": {"name": "digits", "options": {"epochs": 1}}, "fishers": {"shard_size": 1}}
    config, run = write_run_file(tmp_path, **many_shards), tmp_path / "run"
    here = ("--address", head.address)
    log = tmp_path / "followed.log"
    with log.open("wb") as stream:
        submitted = subprocess.Popen(
            ["npeff", "submit", config, *here], env=head.environment, stdout=stream, stderr=subprocess.STDOUT
        )
    job_faults.wait_for(lambda: bool(re.search(r"^fishers: \d+/", log.read_text(), re.MULTILINE)), "it was followed")
    submitted.send_signal(signal.SIGINT)
    assert submitted.wait(timeout=60) == 130
    job = re.search(r"^submitted (npeff-run-[0-9a-f]{8}-1) to ", log.read_text(), re.MULTILINE)[1]
    last = log.read_text().splitlines()[-1]
    assert last.startswith("the job continues: ")
    assert f"npeff submit --stop {job}" in last
    assert "Traceback" not in log.read_text()

    again = head.command("npeff", "submit", config, *here, "--detach")
    assert again.returncode == 0
    assert again.stdout.splitlines()[0] == f"{job} is already active for this run on {head.address}"
    other = head.command("npeff", "submit", write_run_file(tmp_path, seed=1), *here, "--detach")
    assert other.returncode == 2
    assert f"job {job} of {run} is still active and has another run file" in other.stderr
    shown = head.command("npeff", "status", run, *here)
    assert shown.returncode == 0, shown.stderr
    assert re.search(rf"job {job}: RUNNING since .*: fishers: \d+/\d+ shards", shown.stdout)
    assert "partial" in shown.stdout

    config = write_run_file(tmp_path, **many_shards)
    stopped = head.command("npeff", "submit", "--stop", config, *here)
    assert stopped.stdout.startswith(f"{job}: STOPPED; finished work is kept"), stopped.stderr
    assert "npeff: interrupted; run the same command again to resume" in job_faults.log(head, job)
    shards = len(run_contents.units_done(run, "fishers"))
    resumed = job_faults.submit("npeff", head, config, run)
    assert resumed == job.removesuffix("1") + "2"
    job_faults.wait_for(lambda: len(run_contents.units_done(run, "fishers")) > shards, "it resumed")
    assert head.command("npeff", "submit", "--stop", resumed, *here).returncode == 0


def metrics(head: LocalHead, tag: str) -> dict[str, float]:
    """This project's metrics with a tag, as soon as the solver's are on the node's Prometheus endpoint."""
    found: dict[str, float] = {}

    def come() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{head.metrics_port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            if line.startswith("ray_npeff_") and tag in line:
                found[line.partition("{")[0]] = float(line.rpartition(" ")[2])
        return "ray_npeff_explained" in found

    job_faults.wait_for(come, "the metrics were on the endpoint", 60.0)
    return found


def test_a_server_that_does_not_answer_is_one_line(head: LocalHead, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    failed = head.command("npeff", "submit", str(write_run_file(tmp_path)), "--address", f"http://127.0.0.1:{port}")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert f"cannot reach the job server at http://127.0.0.1:{port}" in failed.stderr


@pytest.mark.slow
def test_a_run_file_with_a_mistake_is_refused_before_anything_is_sent(head: LocalHead, tmp_path: Path) -> None:
    config = write_run_file(tmp_path, factorisation={"n_components": 3})
    failed = head.command("npeff", "submit", str(config), "--address", head.address)
    assert failed.returncode == 2
    assert "unknown key 'factorisation' (did you mean 'factorization'?)" in failed.stderr
    assert "submitted" not in json.dumps(failed.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("second_autoscaler", ["0", "1"])
def test_a_cluster_that_is_too_small_is_told_and_left_after_half_a_minute(
    second_autoscaler: str, tmp_path: Path
) -> None:
    config = write_run_file(tmp_path, executor={"workers": 8})
    with LocalHead(RAY_enable_autoscaler_v2=second_autoscaler) as small:
        failed = small.command("npeff", "submit", config, "--address", small.address)
    assert failed.returncode == 2
    assert "waiting for room for 8 workers with 1 CPU each: 2 CPU of 2 CPU in the cluster are free" in failed.stdout
    assert "npeff: error: the cluster has no room for 8 workers with 1 CPU each (it has 2 CPU in total" in failed.stdout


@pytest.mark.slow
def test_a_job_agent_that_hangs_is_told_and_is_one_line(head: LocalHead, tmp_path: Path) -> None:
    (agent,) = head.processes(lambda title: title.startswith("ray::DashboardAgent"))
    agent.suspend()
    try:
        failed = head.command("npeff", "submit", write_run_file(tmp_path), "--address", head.address)
    finally:
        agent.resume()
    assert failed.returncode == 2
    waiting, error = failed.stderr.splitlines()
    assert waiting == f"waiting for the job server at {head.address} to answer, at most 20 s"
    assert error.startswith(f"npeff: error: no job agent of the cluster at {head.address} accepts the job")
