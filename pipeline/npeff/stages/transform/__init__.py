"""Stage `transform`: coefficients of new examples for the components of another run."""

from __future__ import annotations

from npeff.runs.definition import StageDefinition
from npeff.stages.fishers import FISHERS

TRANSFORM = StageDefinition(
    name="transform",
    help="Compute coefficients of new examples for the components of another run. The components stay fixed.",
    function="npeff.stages.transform.stage:transform",
    after=FISHERS,
    in_run=lambda config: False,
    leaves="factorize",
    details=lambda record: f"components of {record['transformed_from']}",
    settings=lambda config: config.factorization_signature(),
    recomputed=False,
    stands=lambda run, record: "transformed_from" in record,
)
