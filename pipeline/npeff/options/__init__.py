"""Options that the library and the run file share, as frozen dataclasses that validate their values.

Sections of the run file use these types directly or construct them for validation. This package does not import torch.
"""
