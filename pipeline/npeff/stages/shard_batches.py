"""Batches in which the gradient rows of a stored shard are computed again."""

from __future__ import annotations

from collections.abc import Sequence

from npeff.gradients import LabelSpec
from npeff.models.loaded import LoadedModel


def batches_of_shard(
    loaded: LoadedModel, labels: LabelSpec, shard: range, used: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Return batches of a shard that contain the used examples.

    For sampled labels, the batches are those in which the Fishers were computed: with other padding, the logits could
    round differently and change a sampled label.

    Args:
        loaded: the examples.
        labels: the labels of the rows.
        shard: numbers of the examples of the shard.
        used: numbers of the used examples.
        batch_size: number of examples in a batch of the stage `fishers`.
    """
    if labels.kind != "sampled":
        return loaded.batches(used, batch_size)
    batches = loaded.batches(shard, batch_size)
    return [examples for examples in batches if not set(used).isdisjoint(examples)]
