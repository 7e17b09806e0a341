"""Stage `inputs`: the Fisher information of the inputs, and which positions it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npeff.runs.definition import StageDefinition, Summary, UnitProgress, finished
from npeff.stages.factorize import FACTORIZE

if TYPE_CHECKING:
    from npeff.runs.config import RunConfig
    from npeff.runs.directory import RunDirectory


def _settings(config: RunConfig) -> Any:
    return config.inputs_or_default.model_dump(mode="json", exclude={"examples": True, "faithfulness": {"examples"}})


def _units(run: RunDirectory) -> UnitProgress:
    return UnitProgress(len(finished(run.partial_results("inputs"))), None, "blocks of examples")


def _details(record: Summary) -> str:
    invalid = f", {record['n_invalid']} not finite" if record["n_invalid"] else ""
    median = record["median_information"]
    found = "" if median is None else f", median information {median:.3g} nats"
    return f"{record['n_examples']} examples{invalid}, {record['covariance']} covariance{found}"


INPUTS = StageDefinition(
    name="inputs",
    help="Compute the Fisher information of the inputs: which pixels, tokens or columns a prediction depends on.",
    function="npeff.stages.inputs.stage:inputs",
    after=FACTORIZE,
    in_run=lambda config: config.inputs is not None,
    stores=("input_covariance.safetensors",),
    whole=("faithfulness",),
    parts="npeff.stages.inputs.parts:input_parts",
    units=_units,
    details=_details,
    settings=_settings,
)
