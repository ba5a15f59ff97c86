"""Matrix products with a weight; those with a quantised weight are in `quantized` and `cpu.linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4.ops.cpu.library import computes
from glm4.ops.cpu.linear import FEW_TOKENS, bf16_linear


class LinearLayer(Protocol):
    """y = x · weightᵀ + bias, however the weight is held."""

    needs_largest: ClassVar[bool]
    """Whether x is rounded by each token's largest magnitude: a layer that sees a part of the inputs must then be told
    that of all of them."""

    def __call__(self, x: Tensor, largest: Tensor | None = None) -> Tensor:
        """x: [tokens, inputs]; largest: float32 [tokens], read where `needs_largest` → [tokens, outputs], of x's
        dtype."""
        ...


class Linear:
    """y = x · weightᵀ + bias, in the weight's number format."""

    needs_largest: ClassVar[bool] = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [outputs, inputs]; bias: [outputs]."""
        self.weight, self.bias = weight, bias
        self._wide_bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor, largest: Tensor | None = None) -> Tensor:
        """x: [tokens, inputs] → [tokens, outputs]; `largest` changes nothing, as nothing is rounded."""
        tokens = x.shape[0]
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        if tokens <= FEW_TOKENS and computes(x) and self.weight.stride(1) == 1:
            return bf16_linear(x, self.weight, self._wide_bias)
        padded = F.pad(x, (0, 0, 0, padded_rows(tokens) - tokens))
        return F.linear(padded, self.weight, self.bias)[:tokens]


class JoinedLinear:
    """Layers over the same inputs, their outputs side by side: a weight whose rows are not together in the file."""

    needs_largest: ClassVar[bool] = False

    def __init__(self, layers: Sequence[Linear]) -> None:
        self._layers = layers

    def __call__(self, x: Tensor, largest: Tensor | None = None) -> Tensor:
        """x: [tokens, inputs] → [tokens, outputs of all layers]."""
        return torch.cat([layer(x) for layer in self._layers], 1)


def padded_rows(rows: int) -> int:
    """The next number of rows for which a bfloat16 product on a CPU is prepared.

    oneDNN compiles code for each number of rows and keeps it: about a millisecond and 100 KB each. So only some numbers
    are used, at most an eighth apart.
    """
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step
