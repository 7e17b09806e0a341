"""The functions of the Python interface take an open run, a configuration, and the path of a run or of a run file."""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path

import npeff
import pytest
from npeff.runs.config import ConfigError, RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.opening import AnyRun, as_run
from npeff.stages.registry import STAGES
from stages.linear_digits import K


def document(folder: Path) -> str:
    return f"""
run_dir: {folder}
task: {{name: "stages.linear_digits:LinearDigits"}}
fishers: {{sketch: {{kind: identity}}, store_dtype: float32}}
factorization: {{n_components: 2, stability_examples: 0, max_iterations: 3}}
verification: {{selectivity_examples: 0, correlation_examples: 0}}
executor: {{kind: serial}}
"""


def test_a_run_file_is_run_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "digits.yaml"
    file.write_text(document(tmp_path / "run"))
    run = npeff.run(str(file))
    assert run.report.exists()
    assert capsys.readouterr() == ("", ""), "standard output of a program without a terminal stays its own"
    assert npeff.run(file) == run
    assert npeff.run(str(run.path)).path == run.path
    before = run.report.stat().st_mtime_ns
    assert npeff.report(str(run.path)) == run.report
    assert run.report.stat().st_mtime_ns > before
    assert npeff.ComponentStore.open(run).component(0).number == 0
    html = run._repr_html_()
    assert html.count(">complete<") == html.count("<tr>") - 1


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.name in ("fishers", "factorize", "lift")])
def test_a_stage_takes_a_path(stage, lifted: RunDirectory) -> None:
    assert stage(str(lifted.path)) == stage(lifted.path) == stage(lifted)


def test_every_function_of_a_stage_takes_any_run_and_shows_its_progress_by_default() -> None:
    functions = {stage.function: stage.resolve(stage.function) for stage in STAGES}
    for function in (*functions.values(), npeff.check, npeff.report, npeff.run):
        parameters = inspect.signature(function, eval_str=True).parameters
        assert next(iter(parameters.values())).annotation == AnyRun, function
        assert parameters["progress"].default == "auto", function


def test_a_configuration_and_a_file_create_the_run(tmp_path: Path) -> None:
    file = tmp_path / "digits.yml"
    file.write_text(document(tmp_path / "run"))
    made = as_run(RunConfig.from_yaml(file))
    assert as_run(file).path == as_run(str(made.path)).path == made.path
    assert as_run(made) is made


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        npeff.run(tmp_path / "missing.yaml")
    with pytest.raises(RunDirectoryError, match=r"it has no run\.yaml: give a run file"):
        npeff.lift(str(tmp_path))


def test_factorizations_are_compared_by_their_paths(lifted: RunDirectory) -> None:
    store = npeff.ComponentStore.open(lifted)
    expected = npeff.compare(store, store)
    assert expected["cosine"].to_pylist() == pytest.approx([1.0] * K)
    assert npeff.compare(str(lifted.path), lifted) == expected
    assert store.similar_components_in(str(lifted.path), 2, 1)["component"].to_pylist() == [2]


def test_the_version_is_that_of_the_package() -> None:
    assert npeff.__version__ == importlib.metadata.version("npeff-pipeline")
    assert "__version__" in dir(npeff)
