"""All stages of a run, in order. A new stage needs a folder with its definition, a line here, a section of the run file
and a page of the documentation."""

from __future__ import annotations

from collections.abc import Iterator

from npeff.runs.definition import StageDefinition
from npeff.stages.attribute import ATTRIBUTE
from npeff.stages.factorize import FACTORIZE
from npeff.stages.fishers import FISHERS
from npeff.stages.inputs import INPUTS
from npeff.stages.lift import LIFT
from npeff.stages.repair import REPAIR
from npeff.stages.scale import SCALE
from npeff.stages.select import SELECT
from npeff.stages.spectrum import SPECTRUM
from npeff.stages.step import STEP
from npeff.stages.transform import TRANSFORM
from npeff.stages.verify import VERIFY

STAGES = (FISHERS, SPECTRUM, STEP, SELECT, TRANSFORM, FACTORIZE, LIFT, VERIFY, ATTRIBUTE, INPUTS, REPAIR, SCALE)


def stages_after(stage: StageDefinition) -> Iterator[StageDefinition]:
    """Yield the stages that depend on the results of ``stage``, directly or indirectly."""
    return (later for later in STAGES if stage in later.ancestors())
