"""Rotary position embedding (Su et al., RoFormer, 2021), in GLM-4's interleaved and partial form."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_max_positions: int | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """Angle per position of each of `dim`/2 pairs, float32 [dim/2].

    With `original_max_positions`, frequencies that turn fewer than `beta_slow` times over the original context
    are slowed down by `factor`, those that turn more than `beta_fast` times are kept, and those between are
    blended linearly (YaRN, Peng et al. 2023, section 3.2).
    """
    periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
    if original_max_positions is None:
        return 1.0 / periods

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original_max_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width divides by zero
    slowed = ((torch.arange(dim // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    return slowed / (factor * periods) + (1 - slowed) / periods


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """By how much YaRN stretches cos and sin (section 3.4 of the paper: 0.1 ln(factor) + 1)."""

    def stretch(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return stretch(mscale) / stretch(mscale_all_dim)
    return stretch(1.0)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of the first part of each head; the rest of the head passes through.

    x: [..., tokens, heads, head_dim]; cos, sin: [tokens, rotary_dim/2], of x's dtype.
    """
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
