"""Matrix products with a weight. Quantised weights will be other classes with the same call."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y = x · weightᵀ + bias, in the weight's number format."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [outputs, inputs]; bias: [outputs]."""
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, inputs] → [tokens, outputs]."""
        return F.linear(x, self.weight, self.bias)
