"""``npeff submit``, which runs a run as a Ray job, and ``npeff status``, which shows the progress of a run."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import npeff
from npeff.cli.app import app
from npeff.cli.entry import EXIT_INTERRUPTED
from npeff.cli.layout import rows_table
from npeff.cli.options import Factorization, open_existing
from npeff.cli.output import say
from npeff.errors import printable
from npeff.execution.ray.jobs import Job, JobServer, Submission
from npeff.storage.location import absolute_location
from npeff.variables import literal

if TYPE_CHECKING:
    from npeff.runs.config import RunConfig

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"  # defined by Ray

Address = Annotated[str, typer.Option(envvar=_ADDRESS_VARIABLE, help="Address of the cluster's job server.")]


@app.command("submit")
def submit(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run file (YAML).")] = None,
    address: Address = _DEFAULT_ADDRESS,
    run_dir: Annotated[
        str | None, typer.Option(help="Directory or URI of the run; overrides run_dir of the run file.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--detach", help="Follow the logs until the job ends.")] = True,
    stop: Annotated[
        str | None,
        typer.Option(
            metavar="JOB",
            help="Stop the job with this id, or the job of this run file. Submit the run again to resume.",
        ),
    ] = None,
    env: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=VALUE]",
            help="Environment variable of the job, readable on the cluster; NAME alone copies the local value.",
        ),
    ] = [],  # noqa: B006
    pip: Annotated[
        list[str],
        typer.Option(
            metavar="REQUIREMENT",
            help="Package to install for the job, such as torchvision==0.26, or a requirements.txt.",
        ),
    ] = [],  # noqa: B006
    py_modules: Annotated[
        list[Path], typer.Option("--py-module", exists=True, help="A Python package to upload, such as the task's.")
    ] = [],  # noqa: B006
    working_dir: Annotated[
        str | None, typer.Option(help="Folder (or URI of a zip file) to upload as the job's working directory.")
    ] = None,
    entrypoint_num_cpus: Annotated[
        float | None, typer.Option(min=0, help="CPUs to reserve for the driver, in addition to the workers' CPUs.")
    ] = None,
    entrypoint_num_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs to reserve for the driver.")] = None,
    entrypoint_memory: Annotated[
        int | None, typer.Option(min=0, help="Bytes of memory to reserve for the driver.")
    ] = None,
    entrypoint_resources: Annotated[
        str | None, typer.Option(metavar="JSON", help='Custom resources to reserve for the driver: {"head": 1}.')
    ] = None,
) -> None:
    """Submit `npeff run` as a Ray job to a cluster.

    A second submission follows the job if it is still active, and otherwise resumes the run in a new job.
    """
    if (run is None) == (stop is None):
        raise typer.BadParameter("give a run file, or --stop JOB")
    if stop is not None:
        return _stop(stop, address)
    resources = {
        "entrypoint_num_cpus": entrypoint_num_cpus,
        "entrypoint_num_gpus": entrypoint_num_gpus,
        "entrypoint_memory": entrypoint_memory,
        "entrypoint_resources": _resources(entrypoint_resources),
    }
    if working_dir is not None and "://" not in working_dir and not Path(working_dir).is_dir():
        raise typer.BadParameter(f"--working-dir {working_dir}: the folder does not exist")
    assert run is not None
    config = npeff.RunConfig.from_yaml(run)
    if run_dir:
        config = config.model_copy(update={"run_dir": literal(run_dir)})
    place = config.resolved("run_dir")
    config = config.model_copy(update={"run_dir": _written_there(config.run_dir, place)})
    submission = Submission(
        run_dir=_there(place),
        run_yaml=config.to_yaml(),
        written_run_dir=config.run_dir,
        environment=dict(_variable(text) for text in env),
        pip=tuple(line for text in pip for line in _requirements(text)),
        py_modules=tuple(py_modules),
        working_dir=working_dir,
        resources={name: value for name, value in resources.items() if value is not None},
    )
    if (package := _absent_package(config, py_modules, working_dir)) is not None:
        say(f"the cluster must have the package {package} of the task: give --py-module unless it is installed there")
    server = JobServer(address)
    job, is_new = server.submit(submission)
    say(f"submitted {job.id} to {address}" if is_new else f"{job.id} is already active for this run on {address}")
    if follow:
        _follow(server, job)
    say(f"to follow it: npeff submit {run} --address {address}")
    say(f"to stop it: npeff submit --stop {job.id} --address {address}")
    return None


@app.command("status")
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run file (YAML), or the directory of a run.")],
    address: Annotated[
        str | None,
        typer.Option(
            envvar=_ADDRESS_VARIABLE, help="Address of a cluster's job server. The job of the run is then shown too."
        ),
    ] = None,
    factorization: Factorization = None,
) -> None:
    """Show the state of each stage of a run, its factorizations, and its job on a cluster.

    A stage is missing (it has no results), partial or complete.
    """
    from rich.console import Console

    from npeff.runs.errors import RunDirectoryError
    from npeff.stages.status import factorizations
    from npeff.stages.status import status as status_of

    run_dir = _run_dir(run)
    try:
        opened = open_existing(run_dir, factorization)
        stages = [(row.stage, row.state, row.done, row.details) for row in status_of(opened)]
        Console().print(rows_table(("stage", "state", "done", "details"), stages))
        if stored := factorizations(opened):
            listed = []
            for each in stored:
                name = f"{each.name} (shown above)" if each.name == opened.name and len(stored) > 1 else each.name
                listed.append((name, str(each.n_components), each.state, ", ".join(each.complete), each.size))
            Console().print(rows_table(("factorization", "components", "state", "complete", "size"), listed))
    except RunDirectoryError as error:
        if address is None:
            raise
        say(f"cannot read the run directory on this machine: {error}")
    if address is not None:
        server = JobServer(address)
        job = server.latest(run_dir)
        line = f"no job of this run on {address}" if job is None else _job_line(job, server.last_line(job.id))
        say(line)


def _follow(server: JobServer, job: Job) -> NoReturn:
    """Print the log until the job ends, then exit with the exit code of the job."""
    try:
        ended = server.follow(job.id, _print_log)
    except KeyboardInterrupt:
        where = f"--address {server.address}"
        say(f"the job continues: the same command follows it, `npeff submit --stop {job.id} {where}` stops it")
        raise SystemExit(EXIT_INTERRUPTED) from None
    if ended.state == "SUCCEEDED":
        raise typer.Exit(0)
    if ended.state == "STOPPED":
        say(f"{job.id} was stopped")
        raise typer.Exit(EXIT_INTERRUPTED)
    if ended.exit_code is None:
        say(next(iter(ended.message.splitlines()), ended.state))
    if ended.exit_code != 2:  # 2 is a user error, which the log explains
        say(f"{job.id} ended ({ended.state}); finished work is kept: submit the run again to resume")
    raise typer.Exit(1 if ended.exit_code is None else ended.exit_code)


def _absent_package(config: RunConfig, py_modules: Sequence[Path], working_dir: str | None) -> str | None:
    """Return the package of a task of the user, if it is not uploaded; None if it is, or for a built-in task."""
    module, separator, _ = config.task.name.partition(":")
    package = module.partition(".")[0]
    if not separator or package == "npeff" or package in (path.stem for path in py_modules):
        return None
    in_folder = working_dir is not None and ("://" in working_dir or any(Path(working_dir).glob(f"{package}*")))
    return None if in_folder else package


def _stop(named: str, address: str) -> None:
    server = JobServer(address)
    if Path(named).exists() or "://" in named:
        run_dir = _run_dir(named)
        job = server.latest(run_dir)
        if job is None:
            raise typer.BadParameter(
                f"--stop {named}: {address} has no job of {run_dir}; give the id of a job, or another --address"
            )
    else:
        job = server.job(named)
    if job.has_ended:
        say(f"{job.id} has ended already ({job.state})")
        return
    job = server.stop(job.id)
    if not job.has_ended:
        raise typer.BadParameter(
            f"--stop {named}: {job.id} has not stopped yet ({job.state}); check it with npeff status, or at {address}"
        )
    say(f"{job.id}: {job.state}; finished work is kept: submit the run again to resume")


def _run_dir(run: str) -> str:
    """Return the absolute path or URI of the run directory that a run file or a directory names."""
    return _there(npeff.RunConfig.from_yaml(run).resolved("run_dir") if Path(run).is_file() else run)


def _there(run_dir: str) -> str:
    return run_dir.rstrip("/") if "://" in run_dir else str(absolute_location(run_dir))


def _written_there(run_dir: str, value: str) -> str:
    """Return the text ``run_dir`` of a run file, made absolute if its value is a relative path."""
    if "://" in value:
        return run_dir.rstrip("/")
    path = Path(run_dir).expanduser()
    return str(path if Path(value).expanduser().is_absolute() else Path(literal(os.getcwd())) / path)


def _job_line(job: Job, last_line: str) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.since))
    code = f" (exit code {job.exit_code})" if job.exit_code else ""
    return f"job {job.id}: {job.state}{code} since {since}: {last_line}"


def _variable(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise typer.BadParameter(
            f"--env {text}: give NAME=VALUE, or the NAME of a variable that is set on this machine"
        )
    if not given and name not in os.environ:
        raise typer.BadParameter(f"--env {name}: the variable is not set on this machine; give {name}=VALUE")
    return name, value if given else os.environ[name]


def _requirements(text: str) -> list[str]:
    """Return a requirement as a list, or the requirements of a requirements file."""
    if not text.endswith(".txt"):
        return [text]
    try:
        lines = [line.partition(" #")[0].strip() for line in Path(text).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise typer.BadParameter(f"--pip {text}: cannot read the file ({error.strerror})") from None
    return [line for line in lines if line and not line.startswith("#")]


def _resources(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(amount, int | float) for amount in found.values()):
        raise typer.BadParameter(f'--entrypoint-resources {text}: give JSON such as {{"head": 1}}')
    return found


def _print_log(text: str) -> None:
    """Print a part of a log, in which progress bars end with a carriage return."""
    print(printable(text.replace("\r\n", "\n").replace("\r", "\n"), keep="\n\t"), end="", flush=True)
