"""All stages of a run, in order. A new stage is a folder that defines it, a line here, a section of the run file and a
page of the documentation."""

from __future__ import annotations

from collections.abc import Iterator

from npeff.runs.definition import StageDefinition
from npeff.stages.attribute import ATTRIBUTE
from npeff.stages.factorize import FACTORIZE
from npeff.stages.fishers import FISHERS
from npeff.stages.lift import LIFT
from npeff.stages.repair import REPAIR
from npeff.stages.select import SELECT
from npeff.stages.transform import TRANSFORM
from npeff.stages.verify import VERIFY

STAGES = (FISHERS, SELECT, TRANSFORM, FACTORIZE, LIFT, VERIFY, ATTRIBUTE, REPAIR)


def stages_after(stage: StageDefinition) -> Iterator[StageDefinition]:
    """The stages that need the results of ``stage``, directly or through others."""
    return (later for later in STAGES if stage in later.ancestors())
