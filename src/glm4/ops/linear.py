"""Matrix products with a weight; those with a quantised weight are in `quantized` and `cpu.linear`."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class LinearLayer(Protocol):
    """y = x · weightᵀ + bias, however the weight is held."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, inputs] → [tokens, outputs], of x's dtype."""
        ...


class Linear:
    """y = x · weightᵀ + bias, in the weight's number format."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [outputs, inputs]; bias: [outputs]."""
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, inputs] → [tokens, outputs]."""
        return F.linear(x, self.weight, self.bias)
