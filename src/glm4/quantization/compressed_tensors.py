"""Folders written by the library compressed-tensors (llm-compressor), in three of its formats.

pack-quantized: weight_packed int32 [out, in·bits/32], a word holds consecutive inputs, the first in the lowest bits, as
signed integers plus 2^(bits-1); weight_zero_point, where there is one, is packed likewise along the outputs.
int-quantized: weight int8 [out, in], weight_zero_point int8. float-quantized: weight F8_E4M3 [out, in].
All have weight_scale float: [out, groups], [out, 1] for a scale a row, one number for a scale a tensor, or one for each
block. Scales of activations are passed over: activations are not rounded as the folder says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from glm4.ops.quantized import QuantizedWeight
from glm4.quantization.fp8 import ONE_NUMBER, block_size
from glm4.quantization.layout import Layout, stored_layout
from glm4.quantization.quantize import unpack_nibbles
from glm4.quantization.stored import FLOATS, Part, Settings, StoredFormat, by_turns, hold, scale_floats, words_as_bytes

_TYPES = {"pack-quantized": ("int",), "int-quantized": ("int",), "float-quantized": ("float",)}
_CHANGE_THE_MODEL = ("sparsity_config", "transform_config", "kv_cache_scheme")


class CompressedTensors(StoredFormat):
    """Integers of 4 or 8 bits; weights whose inputs were reordered, and floats, are dequantised."""

    method = "compressed-tensors"

    def __init__(self, settings: Settings) -> None:
        for key in _CHANGE_THE_MODEL:
            value = settings.values.get(key)
            if value and not (isinstance(value, dict) and value.get("format") == "dense"):
                settings.refuse(f"{key} is not supported")
        scheme, stored_as = _only_scheme(settings)
        settings = Settings(scheme, settings.where)
        self.packed = stored_as == "pack-quantized"
        self.floats = settings.one_of("type", *_TYPES[stored_as], default="int") == "float"
        self.bits: int = settings.one_of("num_bits", *((4, 8) if self.packed else (8,)))
        self.symmetric: bool = settings.one_of("symmetric", *((True,) if self.floats else (True, False)), default=True)
        strategies = ("tensor", "channel", "block") if self.floats else ("tensor", "channel", "group")
        self.strategy: str = settings.one_of("strategy", *strategies, default="tensor")
        self.group_size = settings.group_size() if self.strategy == "group" else -1
        self.block = block_size(settings, "block_structure") if self.strategy == "block" else None
        order = settings.one_of("actorder", "weight", "static", "group", "dynamic", None)
        self.reordered = order in ("group", "dynamic")
        self.marker = "weight_packed" if self.packed else "weight_scale"

    def _scale_block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Outputs and inputs that share a scale."""
        outputs, inputs = shape
        blocks = {"tensor": (outputs, inputs), "channel": (1, inputs), "group": (1, self.group_size)}
        return self.block or blocks[self.strategy]

    def layout(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        if self.floats or self.reordered:
            return None
        return stored_layout(self.bits, self._scale_block(shape)[1], shape[1], self.symmetric)

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, Part]:
        (outputs, inputs), (rows, columns) = shape, self._scale_block(shape)
        table = (-(-outputs // rows), -(-inputs // columns))
        tables = ONE_NUMBER if self.strategy == "tensor" else (table,)
        parts = {
            "weight_scale": Part(FLOATS, tables),
            "input_scale": Part(FLOATS, ONE_NUMBER, optional=True),
            "input_zero_point": Part(("I8", "F8_E4M3"), ONE_NUMBER, optional=True),
        }
        if self.packed:
            words = -(-inputs * self.bits // 32)
            parts["weight_packed"] = Part(("I32",), ((outputs, words),))
            parts["weight_shape"] = Part(("I64", "I32"), ((2,),))
            parts["weight_g_idx"] = Part(("I32",), ((inputs,),), optional=not self.reordered)
            zeros = Part(("I32",), ((-(-table[0] * self.bits // 32), table[1]),), optional=self.symmetric)
        else:
            parts["weight"] = Part(("F8_E4M3",) if self.floats else ("I8",), (shape,))
            zeros = Part(("F8_E4M3",) if self.floats else ("I8",), tables, optional=self.symmetric)
        return parts | {"weight_zero_point": zeros}

    def read(self, name: str, shape: tuple[int, ...], part: Callable[[str], Tensor]) -> QuantizedWeight | Tensor:
        outputs, _ = shape
        scales = part("weight_scale")
        if self.floats:
            scales = scales.view(1, 1) if self.strategy == "tensor" else scales
            return scale_floats(part("weight"), scales, self._scale_block(shape))
        values = self._values(shape, part)
        if self.strategy == "tensor":
            scales = scales.view(1, 1).expand(outputs, 1)
        zeros = torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.uint8)
        if not self.symmetric:
            zeros = self._zeros(part("weight_zero_point"), outputs)
        in_order = by_turns(shape[1], self._scale_block(shape)[1])
        group_of = part("weight_g_idx").long() if self.reordered else in_order
        return hold(self.layout(name, shape), self.bits, values, scales, zeros, group_of)

    def _values(self, shape: tuple[int, ...], part: Callable[[str], Tensor]) -> Tensor:
        """As unsigned integers, in the order that `hold` takes."""
        outputs, inputs = shape
        if not self.packed:
            return part("weight").view(torch.uint8) ^ 128
        if part("weight_shape").tolist() != [outputs, inputs]:
            raise ValueError(f"is said to have the shape {part('weight_shape').tolist()}, not {[outputs, inputs]}")
        return words_as_bytes(part("weight_packed")).flatten(1)[:, : inputs * self.bits // 8]

    def _zeros(self, stored: Tensor, outputs: int) -> Tensor:
        """As unsigned integers, uint8 [out, groups]."""
        if not self.packed:
            return (stored.view(torch.uint8) ^ 128).view(-1, 1).expand(outputs, 1)
        fields = words_as_bytes(stored)
        fields = unpack_nibbles(fields) if self.bits == 4 else fields
        return fields.transpose(1, 2).flatten(0, 1)[:outputs]


def _only_scheme(settings: Settings) -> tuple[Mapping[str, Any], str]:
    """How weights are quantised, and the format they are stored in: the same for all, or refused."""
    groups = settings.values.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        settings.refuse("config_groups is not an object of schemes")
    found = {name: (group.get("weights"), group.get("format")) for name, group in groups.items()}
    schemes = [entry for entry in found.values() if entry[0]]
    if not schemes or any(entry != schemes[0] for entry in schemes):
        settings.refuse(f"{len(schemes)} ways to quantise weights in config_groups are not supported, one is")
    weights, own = schemes[0]
    stored_as = own or settings.values.get("format")
    if stored_as == "naive-quantized":  # the older name of both
        stored_as = "float-quantized" if weights.get("type") == "float" else "int-quantized"
    if stored_as not in _TYPES:
        settings.refuse(f"format {stored_as!r} is not supported (supported: {', '.join(_TYPES)})")
    return weights, stored_as
