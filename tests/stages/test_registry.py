"""The registry of stages: what it says agrees with the rest of the package, and reading it imports nothing heavy."""

from __future__ import annotations

import inspect
import subprocess
import sys

import npeff
import pytest
from npeff.cli.main import app
from npeff.runs.config import RunConfig
from npeff.runs.definition import StageDefinition
from npeff.stages.factorize import FACTORIZE
from npeff.stages.registry import STAGES, stages_after
from npeff.store.schemas import SCHEMAS
from npeff.store.table_names import LABEL, WRITTEN_BY


def test_every_stage_has_a_command_of_its_name_with_its_line_of_help() -> None:
    commands = {command.name: command for command in app.registered_commands}
    for stage in STAGES:
        assert commands[stage.name].help == stage.help


def test_the_code_that_a_definition_names_is_there() -> None:
    for stage in STAGES:
        parameters = inspect.signature(stage.resolve(stage.function)).parameters
        assert {"run", "executor", "progress"} <= set(parameters)
        if stage.parts is not None:
            assert callable(stage.resolve(stage.parts))
        for key in stage.optional.values():
            section, *inner = key.split(".")
            model = RunConfig.model_fields[section].annotation
            for name in inner:
                field = model.model_fields[name]
                model = field.annotation
            assert model in (bool, int)
            assert not field.default, "0 and false, the defaults, leave the table out"


def test_every_stage_is_a_public_function() -> None:
    for stage in STAGES:
        name = stage.function.partition(":")[2]
        assert name in dir(npeff)
        assert getattr(npeff, name) is stage.resolve(stage.function)


def test_every_table_is_written_by_a_stage() -> None:
    assert set(WRITTEN_BY) == set(SCHEMAS)
    assert set(WRITTEN_BY.values()) - {LABEL} <= {stage.name for stage in STAGES}
    for stage in STAGES:
        for table, later in stage.completed_later.items():
            (completing,) = (each for each in STAGES if each.name == later)
            assert table in completing.completes


def test_stages_are_listed_after_those_that_they_need() -> None:
    for place, stage in enumerate(STAGES):
        assert all(STAGES.index(earlier) < place for earlier in stage.ancestors())
    names = ["lift", "verify", "attribute", "inputs", "repair", "scale"]
    assert [stage.name for stage in stages_after(FACTORIZE)] == names


@pytest.mark.process
def test_reading_the_registry_imports_only_the_standard_library_and_this_package() -> None:
    script = (
        "import sys; before = set(sys.modules); import npeff.stages.registry\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(tops - set(sys.stdlib_module_names) - {'npeff'}))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_definition_can_be_run_and_says_what_is_missing(tmp_path) -> None:
    config = RunConfig.model_validate(
        {"run_dir": str(tmp_path / "run"), "task": {"name": "digits"}, "factorization": {"n_components": 3}}
    )
    run = npeff.RunDirectory.create(config)
    assert isinstance(FACTORIZE, StageDefinition)
    with pytest.raises(npeff.NpeffError, match=r"stage fishers of .* is not complete: run `npeff fishers .*` first"):
        FACTORIZE(run)
