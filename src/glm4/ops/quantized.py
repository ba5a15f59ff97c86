"""Weights in 4 or 8 bits: what they hold, and the readable arithmetic that faster kernels are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight matrix [out_features, in_features] in 4 or 8 bits, in an order that suits every CPU.

    w[o, i] = scales[o, i // group_size] · (q[o, i] - zero point of that group).
    """

    bits: int
    """4 or 8."""
    group_size: int
    """Inputs that share a scale; in_features for one scale a row."""
    values: Tensor
    """bits 4: uint8 [out, in // 2], the even input in the low nibble; bits 8: int8 [out, in]."""
    scales: Tensor
    """float32 [out, in // group_size]."""
    zeros: Tensor | None = None
    """uint8 [out, in // group_size], bits 4 only; None: 8 (bits 4), 0 (bits 8)."""

    def __post_init__(self) -> None:
        rows, stored = self.values.shape
        inputs = stored * 8 // self.bits
        groups = inputs // self.group_size
        fits = (
            (self.bits, self.values.dtype) in ((4, torch.uint8), (8, torch.int8))
            and groups * self.group_size == inputs
            and self.scales.shape == (rows, groups)
            and self.scales.dtype is torch.float32
            and (self.zeros is None or (self.bits == 4 and self.zeros.shape == (rows, groups)))
            and (self.zeros is None or self.zeros.dtype is torch.uint8)
        )
        if not fits:
            raise ValueError(
                f"{self.bits}-bit values {self.values.dtype} {list(self.values.shape)} in groups of {self.group_size} "
                f"do not go with scales {self.scales.dtype} {list(self.scales.shape)}"
                + ("" if self.zeros is None else f" and zeros {self.zeros.dtype} {list(self.zeros.shape)}")
            )

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1] * 8 // self.bits

    def integers(self) -> Tensor:
        """q - zero point, int32 [out, in]."""
        rows, inputs = self.out_features, self.in_features
        if self.bits == 8:
            return self.values.int()
        nibbles = torch.stack((self.values & 15, self.values >> 4), dim=-1).view(rows, inputs).int()
        zeros = 8 if self.zeros is None else self.zeros.int().repeat_interleave(self.group_size, dim=1)
        return nibbles - zeros

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights as numbers of `dtype`, [out, in]; computed in float32."""
        grouped = self.integers().float().view(*self.scales.shape, self.group_size)
        return (grouped * self.scales[..., None]).view(self.out_features, self.in_features).to(dtype)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x · wᵀ + bias with the weight made whole again; x: [tokens, in] → [tokens, out], of x's dtype."""
    return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))


class QuantizedLinear:
    """The layer that runs where no kernel does: `quantized_linear` with a weight and bias of its own."""

    needs_largest: ClassVar[bool] = False

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        """bias: [out]."""
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, largest: Tensor | None = None) -> Tensor:
        """x: [tokens, in] → [tokens, out], of x's dtype; `largest` changes nothing, as nothing is rounded."""
        return quantized_linear(x, self.weight, self.bias)


def quantize_activations(x: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token's values as whole numbers of -127 … 127 and one scale: int8 [tokens, in], float32 [tokens, 1].

    The scale is a 127th of the token's largest magnitude or, where that is more, of `largest`, float32 [tokens]: what
    it is over all inputs where x holds a part of them, so that the parts are rounded as the whole is.
    A token that holds NaN or infinity has the scale NaN; one whose values are all below 1e-30 becomes zeros.
    """
    wide = x.float()
    most = wide.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else wide.new_zeros(x.shape[0], 1)
    if largest is not None:
        most = torch.maximum(most, largest[:, None])
    usable = torch.isfinite(most) & (most > 1e-30)
    inverse = torch.where(usable, 127.0 / most, 0.0)
    values = torch.where(usable, wide * inverse, 0.0).round().clamp(-127, 127).to(torch.int8)
    return values, torch.where(torch.isfinite(most), most / 127.0, torch.nan)


def dynamic_quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, largest: Tensor | None = None
) -> Tensor:
    """x · wᵀ + bias with x rounded to 8 bits a token, as the CPU kernels compute it: exact whole numbers in a group,
    float64 across groups; x: [tokens, in], `largest`: as in `quantize_activations` → [tokens, out], of x's dtype."""
    values, scale = quantize_activations(x, largest)
    by_group = (-1, weight.in_features // weight.group_size, weight.group_size)
    grouped_x = values.double().view(by_group).transpose(0, 1)  # sums stay below 2**53: exact
    grouped_w = weight.integers().double().view(by_group).transpose(0, 1)
    dots = grouped_x @ grouped_w.transpose(1, 2)  # [groups, tokens, rows]
    out = (dots * weight.scales.double().t()[:, None, :]).sum(0) * scale.double()
    return (out if bias is None else out + bias.double()).to(x.dtype)
