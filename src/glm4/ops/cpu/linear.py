"""Linear layers on the native kernels, which round activations to 8 bits a token."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from glm4.ops.cpu.library import DTYPES, WeightStruct, load, need
from glm4.ops.cpu.memory import Arena, map_in
from glm4.ops.cpu.panels import PANEL_ROWS, PanelWeight, panel_shapes
from glm4.ops.quantized import QuantizedLinear, QuantizedWeight

FEW_TOKENS = 8
"""Up to so many, the native bfloat16 kernel is faster than torch's (see benchmarks/LOG.md)."""

_MOST_INPUTS_A_GROUP = 65536  # sums of 255 · 127 stay below 2**31
_MOST_INPUTS_WITH_ZEROS = 256  # sums of 127 stay below 2**15


def make_quantized_linear(
    weight: QuantizedWeight | PanelWeight, bias: Tensor | None = None, arena: Arena | None = None
) -> PackedLinear | QuantizedLinear:
    """The fastest linear layer there is for this weight on this CPU; `arena`: see PackedLinear.

    A PanelWeight is used where it lies, and read from the disk here if it is in a mapped file.
    """
    if load() is None or not PackedLinear.accepts(weight):
        return QuantizedLinear(weight.unpack() if isinstance(weight, PanelWeight) else weight, bias)
    if isinstance(weight, PanelWeight):
        return PackedLinear.over(weight, bias)
    return PackedLinear.pack(weight, bias, arena)


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias in bfloat16: x [tokens, in], weight [out, in], bias float32 [out] → [tokens, out].

    Made for few tokens, which wait for memory; torch multiplies more than FEW_TOKENS faster.
    Raises ValueError for what the kernel does not know.
    """
    (tokens, inputs), rows = x.shape, weight.shape[0]
    fits = (
        x.dtype is weight.dtype is torch.bfloat16
        and weight.shape[1] == inputs
        and weight.stride(1) == 1
        and (bias is None or (bias.shape == (rows,) and bias.dtype is torch.float32 and bias.is_contiguous()))
    )
    if not fits:
        raise ValueError(f"the CPU kernels cannot multiply {x.dtype} {list(x.shape)} with {list(weight.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(tokens, rows, dtype=x.dtype)
    need().glm4_linear_bf16(
        weight.data_ptr(),
        rows,
        inputs,
        weight.stride(0),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        tokens,
        x.stride(0),
        out.data_ptr(),
        out.stride(0),
    )
    return out


class PackedLinear:
    """y = round8(x) · wᵀ + bias, the weight in the CPU kernels' order.

    A token's result is the same, bit for bit, whatever the other tokens, the threads and the instruction set.
    A token that holds NaN or infinity gives NaN everywhere.
    """

    needs_largest: ClassVar[bool] = True
    """Whether a layer that sees a part of the inputs must be told the whole's largest magnitudes."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        bits: int,
        group_size: int,
        *,
        zeros: bool = False,
        half_scales: bool = False,
        bias: Tensor | None = None,
        arena: Arena | None = None,
        panels: PanelWeight | None = None,
    ) -> None:
        """Room for a weight, to be filled by `fill`; every row counts as zeros until then.

        bias: [out]. half_scales: keep scales in 16 bits; every one must then be a float16 exactly. arena: where to take
        memory from; none: memory of its own. panels: the weight itself, see `over`.
        Raises RuntimeError where there are no native kernels, MemoryError where there is no room.
        """
        self.out_features, self.in_features = out_features, in_features
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self._struct = WeightStruct(
            rows=out_features,
            inputs=in_features,
            bits=bits,
            group_size=group_size,
            half_scales=half_scales,
            bias=None if self._bias is None else self._bias.data_ptr(),
        )
        if panels is None:
            sizes = (ctypes.c_int64 * 3)()
            need().glm4_weight_sizes(self._struct, sizes)
            memory = (arena or Arena(0)).take(sum(sizes[: 3 if zeros else 2]))
            self._memory = list(torch.split(memory, sizes[: 3 if zeros else 2]))
        else:
            self._memory = [panels.values, panels.scales] + ([] if panels.zeros is None else [panels.zeros])
        self.nbytes = sum(part.nbytes for part in self._memory)
        self._panels = panels
        self._struct.values, self._struct.scales, *rest = (part.data_ptr() for part in self._memory)
        self._struct.zeros = rest[0] if rest else None

    @property
    def struct(self) -> WeightStruct:
        """What the kernels take; valid while this layer is there."""
        return self._struct

    @staticmethod
    def accepts(weight: QuantizedWeight | PanelWeight) -> bool:
        """Whether the kernels know this group size."""
        size = weight.group_size
        if weight.bits == 4:
            return size % 8 == 0 and size <= (_MOST_INPUTS_A_GROUP if weight.zeros is None else _MOST_INPUTS_WITH_ZEROS)
        return (size % 4 == 0 or size == weight.in_features) and size <= _MOST_INPUTS_A_GROUP

    @classmethod
    def pack(cls, weight: QuantizedWeight, bias: Tensor | None = None, arena: Arena | None = None) -> PackedLinear:
        """The whole of `weight`, with 16-bit scales where that loses nothing. Raises as the constructor does."""
        if not cls.accepts(weight):
            raise ValueError(f"the CPU kernels know no groups of {weight.group_size} in {weight.bits} bits")
        packed = cls(
            weight.out_features,
            weight.in_features,
            weight.bits,
            weight.group_size,
            zeros=weight.zeros is not None,
            half_scales=bool(torch.equal(weight.scales.half().float(), weight.scales)),
            bias=bias,
            arena=arena,
        )
        packed.fill(0, weight)
        return packed

    @classmethod
    def over(cls, weight: PanelWeight, bias: Tensor | None = None) -> PackedLinear:
        """The layer that reads `weight` where it lies, which may be a mapped file; nothing is copied.

        Raises RuntimeError where there are no native kernels, ValueError for parts that do not belong together.
        """
        packed = cls(
            weight.out_features,
            weight.in_features,
            weight.bits,
            weight.group_size,
            zeros=weight.zeros is not None,
            half_scales=weight.scales.dtype is torch.float16,
            bias=bias,
            panels=weight,
        )
        values, scales = panel_shapes(weight.out_features, weight.in_features, weight.bits, weight.group_size)
        expected = [values, scales] + ([] if weight.zeros is None else [scales])
        if [part.shape for part in packed._memory] != expected or not all(p.is_contiguous() for p in packed._memory):
            raise ValueError(f"parts of {[list(part.shape) for part in packed._memory]} are no weight in panels")
        for part in packed._memory:
            map_in(part)
        return packed

    def fill(self, first_row: int, block: QuantizedWeight) -> None:
        """Repack rows [first_row, first_row + block.out_features); both ends are multiples of 32, or the weight's end.

        Raises ValueError for a block that does not fit.
        """
        if self._panels is not None:
            raise ValueError(f"rows {first_row} and more cannot be put into a weight that is used where it lies")
        struct, end = self._struct, first_row + block.out_features
        same_kind = (block.bits, block.group_size, block.in_features) == (
            struct.bits,
            struct.group_size,
            struct.inputs,
        ) and (block.zeros is not None) == bool(struct.zeros)
        inside = first_row % PANEL_ROWS == 0 and (end % PANEL_ROWS == 0 or end == self.out_features)
        if not (same_kind and inside and 0 <= first_row <= end <= self.out_features):
            raise ValueError(f"rows {first_row} to {end} do not fit into a weight of {self.out_features} rows")
        if struct.half_scales and not torch.equal(block.scales.half().float(), block.scales):
            raise ValueError(f"rows {first_row} to {end}: a scale is no float16")
        values, scales = block.values.contiguous(), block.scales.contiguous()
        zeros = None if block.zeros is None else block.zeros.contiguous()
        need().glm4_pack_rows(
            struct,
            first_row,
            block.out_features,
            values.data_ptr(),
            scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
        )

    def __call__(self, x: Tensor, largest: Tensor | None = None) -> Tensor:
        """x: float32 or bfloat16 [tokens, in] → [tokens, out], of x's dtype.

        largest: float32 [tokens], see `ops.quantized.quantize_activations`.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"a weight of {self.in_features} inputs got activations of {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"the CPU kernels take float32 or bfloat16, not {x.dtype}")
        if x.stride(1) != 1:
            x = x.contiguous()
        if largest is not None:
            if largest.shape != x.shape[:1] or largest.dtype is not torch.float32:
                raise ValueError(f"{x.shape[0]} tokens got {largest.dtype} {list(largest.shape)} largest magnitudes")
            largest = largest.contiguous()
        out = torch.empty(x.shape[0], self.out_features, dtype=x.dtype)
        need().glm4_linear(
            self._struct,
            x.data_ptr(),
            x.shape[0],
            x.stride(0),
            DTYPES[x.dtype],
            None if largest is None else largest.data_ptr(),
            out.data_ptr(),
            out.stride(0),
        )
        return out
