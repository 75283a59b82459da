"""Rotary frequencies, as transformers computes them, to the last bit."""

from __future__ import annotations

import math

import torch

from megatron_sod.model.geometry import Geometry


def inverse_frequencies(geometry: Geometry) -> torch.Tensor:
    """[head_dim / 2] float32 radians per position, stretched where the model's `rope_scaling` says.

    Wavelengths up to original / high_freq_factor stay, those from original / low_freq_factor on
    grow by `factor`, and a ramp that is linear in 1 / wavelength joins the two.
    """
    dims = torch.arange(0, geometry.head_dim, 2, dtype=torch.int64).float() / geometry.head_dim
    frequencies = 1.0 / geometry.rope_theta**dims
    if (scaling := geometry.rope_scaling) is None:
        return frequencies
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    kept = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    ramp = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    stretched = torch.where(
        wavelengths > original / scaling.low_freq_factor, frequencies / scaling.factor, ramp
    )
    return torch.where(wavelengths < original / scaling.high_freq_factor, frequencies, stretched)
