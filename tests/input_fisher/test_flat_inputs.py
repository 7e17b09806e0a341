"""Inputs of any shape become positions and features, and back."""

import torch
from npeff.input_fisher.flat_inputs import FlatInputs


def test_images_become_pixels_with_channels_and_back():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    flat = FlatInputs.of(images, lambda values: values, positions=(2, 3))
    assert flat.values_BPF.shape == (2, 20, 3)
    assert torch.equal(flat.values_BPF[1, 7], images[1, :, 1, 2])
    assert torch.equal(flat.logits(flat.values_BPF), images)
    assert flat.used_BP.all()


def test_without_positions_every_entry_is_one():
    values = torch.arange(24.0).view(2, 3, 4)
    flat = FlatInputs.of(values, lambda values: values)
    assert flat.values_BPF.shape == (2, 12, 1)
    assert torch.equal(flat.logits(flat.values_BPF + 1), values + 1)
