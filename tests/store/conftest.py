"""Shards of random Fishers."""

from shards import shard_arrays

__all__ = ["shard_arrays"]
