"""Quantised weights in the order in which the native kernels read them: the same for every instruction set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glm4.ops.quantized import QuantizedWeight

PANEL_ROWS = 32
"""Rows that are interleaved: blocks of a weight begin at a multiple of it."""
_STEP = 4
"""Inputs of a row that lie together."""


def panel_shapes(rows: int, inputs: int, bits: int, group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a PanelWeight's values, and of its scales and zeros."""
    panels, padded = -(-rows // PANEL_ROWS), -(-inputs // _STEP) * _STEP
    return (panels, padded * PANEL_ROWS * bits // 8), (panels, inputs // group_size, PANEL_ROWS)


@dataclass(frozen=True, slots=True)
class PanelWeight:
    """A weight matrix [out_features, in_features] in panels of 32 rows; rows that fill up the last have the scale 0."""

    out_features: int
    in_features: int
    bits: int
    """4 or 8."""
    group_size: int
    """Inputs that share a scale: a multiple of 4, or all."""
    values: Tensor
    """uint8 [panels, bytes]: four inputs of each row, then the next four. bits 8: bytes (row, input), plus 128;
    bits 4: rows 0 … 15 in the low nibbles of as many bytes, rows 16 … 31 in the high ones."""
    scales: Tensor
    """float16 or float32 [panels, in // group_size, 32]."""
    zeros: Tensor | None = None
    """uint8 [panels, in // group_size, 32]; None: 8 (bits 4), 128 (bits 8)."""

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> PanelWeight:
        """The same numbers in this order; scales in 16 bits where that loses nothing."""
        rows, inputs, bits = weight.out_features, weight.in_features, weight.bits
        panels, steps = -(-rows // PANEL_ROWS), -(-inputs // _STEP)

        def by_panel(x: Tensor) -> Tensor:
            padded = x.new_zeros(panels * PANEL_ROWS, x.shape[1])
            padded[:rows] = x
            return padded.view(panels, PANEL_ROWS, -1)

        if bits == 8:
            padded = by_panel(torch.nn.functional.pad(weight.values, (0, steps * _STEP - inputs)))
            values = padded.view(torch.uint8).view(panels, PANEL_ROWS, steps, _STEP).transpose(1, 2) ^ 128
        else:
            bytes_ = by_panel(weight.values)
            nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), -1).view(panels, 2, PANEL_ROWS // 2, steps, _STEP)
            values = (nibbles[:, 0] | nibbles[:, 1] << 4).transpose(1, 2)
        scales = by_panel(weight.scales).transpose(1, 2).contiguous()
        if torch.equal(scales.half().float(), scales):
            scales = scales.half()
        zeros = None if weight.zeros is None else by_panel(weight.zeros).transpose(1, 2).contiguous()
        return cls(rows, inputs, bits, weight.group_size, values.reshape(panels, -1), scales, zeros)

    def unpack(self) -> QuantizedWeight:
        """The weight in an order that suits everything else; a copy."""
        rows, inputs = self.out_features, self.in_features
        panels, steps = self.values.shape[0], -(-inputs // _STEP)

        def by_row(x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(panels * PANEL_ROWS, -1)[:rows]

        if self.bits == 8:
            bytes_ = self.values.view(panels, steps, PANEL_ROWS, _STEP).transpose(1, 2) ^ 128
            values = bytes_.reshape(panels * PANEL_ROWS, -1)[:rows, :inputs].contiguous().view(torch.int8)
        else:
            both = self.values.view(panels, steps, PANEL_ROWS // 2, _STEP).transpose(1, 2)
            nibbles = torch.stack((both & 15, both >> 4), 1).reshape(panels * PANEL_ROWS, -1)[:rows]
            values = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        zeros = None if self.zeros is None else by_row(self.zeros)
        return QuantizedWeight(self.bits, self.group_size, values, by_row(self.scales.float()), zeros)
