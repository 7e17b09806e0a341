"""What a run keeps: Fishers, components, directions, checkpoints, tables."""
