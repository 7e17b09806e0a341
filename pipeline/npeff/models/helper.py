"""A process that keeps its part of a model for the first process of its worker."""

from __future__ import annotations

from torch import nn

from npeff.execution.team import current_team
from npeff.models.loaded import ModelSpec


class ModelHelper:
    """Keeps the shards of the model that the first process of the worker loads, see `npeff.models.sharding`."""

    def __init__(self, model: ModelSpec) -> None:
        team = current_team()
        assert team is not None
        self._spec, self._team = model, team
        self._shards: nn.Module | None = None
        team.when_loading(self._load)

    def _load(self) -> None:
        self._shards = None
        self._shards = self._spec.load_shards(self._team)
