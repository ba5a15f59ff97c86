"""Linear layers on the native kernels, which round activations to 8 bits a token."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from glm4.ops.cpu.library import DTYPES, WeightStruct, load, need
from glm4.ops.cpu.memory import Arena
from glm4.ops.quantized import QuantizedLinear, QuantizedWeight

PANEL_ROWS = 32
"""Rows that the kernels interleave: blocks of a weight begin at a multiple of it."""

FEW_TOKENS = 8
"""Up to so many, the native bfloat16 kernel is faster than torch's (see benchmarks/LOG.md)."""

_MOST_INPUTS_A_GROUP = 65536  # sums of 255 · 127 stay below 2**31
_MOST_INPUTS_WITH_ZEROS = 256  # sums of 127 stay below 2**15


def make_quantized_linear(
    weight: QuantizedWeight, bias: Tensor | None = None, arena: Arena | None = None
) -> PackedLinear | QuantizedLinear:
    """The fastest linear layer there is for this weight on this CPU; `arena`: see PackedLinear."""
    if load() is None or not PackedLinear.accepts(weight):
        return QuantizedLinear(weight, bias)
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
        and weight.is_contiguous()
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
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        tokens,
        x.stride(0),
        out.data_ptr(),
        out.stride(0),
    )
    return out


class PackedLinear:
    """y = round8(x) · wᵀ + bias, the weight repacked for the CPU in memory of its own.

    A token's result is the same, bit for bit, whatever the other tokens, the threads and the instruction set.
    A token that holds NaN or infinity gives NaN everywhere.
    """

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
    ) -> None:
        """Room for a weight, to be filled by `fill`; every row counts as zeros until then.

        bias: [out]. half_scales: keep scales in 16 bits; every one must then be a float16 exactly. arena: where to take
        memory from; none: memory of its own.
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
        sizes = (ctypes.c_int64 * 3)()
        need().glm4_weight_sizes(self._struct, sizes)
        self.nbytes = sum(sizes[: 3 if zeros else 2])
        self._memory = (arena or Arena(0)).take(self.nbytes)
        memory = self._memory.data_ptr()
        self._struct.values = memory
        self._struct.scales = memory + sizes[0]
        self._struct.zeros = memory + sizes[0] + sizes[1] if zeros else None

    @staticmethod
    def accepts(weight: QuantizedWeight) -> bool:
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

    def fill(self, first_row: int, block: QuantizedWeight) -> None:
        """Repack rows [first_row, first_row + block.out_features); both ends are multiples of 32, or the weight's end.

        Raises ValueError for a block that does not fit.
        """
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

    def __call__(self, x: Tensor) -> Tensor:
        """x: float32 or bfloat16 [tokens, in] → [tokens, out], of x's dtype."""
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"a weight of {self.in_features} inputs got activations of {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"the CPU kernels take float32 or bfloat16, not {x.dtype}")
        if x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty(x.shape[0], self.out_features, dtype=x.dtype)
        need().glm4_linear(
            self._struct,
            x.data_ptr(),
            x.shape[0],
            x.stride(0),
            DTYPES[x.dtype],
            out.data_ptr(),
            out.stride(0),
        )
        return out
