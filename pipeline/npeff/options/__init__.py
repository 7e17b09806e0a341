"""Options that the library and the run file have in common: frozen dataclasses, validated where they are made.

The sections of the run file are these types, or are checked by making them. Nothing here imports torch.
"""
