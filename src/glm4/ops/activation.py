"""The gated activation of the feed-forward half."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """up · silu(gate) (Shazeer, 2020); gate_up: [..., 2·size], the gate's half first → [..., size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)
