"""The packed folder that `glm4 quantize` writes: a model folder whose linear weights are already in 4 or 8 bits.

It is a Hugging Face folder with one model.safetensors, and in config.json

    "quantization_config": {"quant_method": "glm4", "format_version": 1, "quantization": "int4", "group_size": 128}

from which `chosen_layout` tells how each weight is held. The weight `M.weight` is in `M.weight.values`,
`M.weight.scales` and `M.weight.zeros`: the tensors of a QuantizedWeight as they are, an order that suits every CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from glm4.ops.quantized import QuantizedWeight
from glm4.quantization.layout import GROUP_SIZES, Layout, chosen_layout
from glm4.quantization.stored import Part, Settings, StoredFormat

FORMAT_VERSION = 1


class Packed(StoredFormat):
    """Read without copying or computing anything."""

    method = "glm4"
    marker = "weight.values"
    includes_head = True

    def __init__(self, settings: Settings) -> None:
        settings.one_of("format_version", FORMAT_VERSION)
        self.quantization: str = settings.one_of("quantization", "int8", "int4")
        self.group: int = settings.one_of("group_size", *GROUP_SIZES)

    @classmethod
    def settings(cls, quantization: str, group_size: int) -> dict[str, Any]:
        """The `quantization_config` of a folder."""
        return {
            "quant_method": cls.method,
            "format_version": FORMAT_VERSION,
            "quantization": quantization,
            "group_size": group_size,
        }

    def layout(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        return chosen_layout(name, shape, self.quantization, self.group)

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, Part]:
        fields = stored_parts(self._layout(name, shape), shape)
        return {f"weight.{field}": Part((dtype,), (size,)) for field, (dtype, size) in fields.items()}

    def read(self, name: str, shape: tuple[int, ...], part: Callable[[str], Tensor]) -> QuantizedWeight:
        layout = self._layout(name, shape)
        tensors = {field: part(f"weight.{field}") for field in stored_parts(layout, shape)}
        return QuantizedWeight(layout.bits, layout.group_size, **tensors)

    def _layout(self, name: str, shape: tuple[int, ...]) -> Layout:
        layout = self.layout(name, shape)
        assert layout is not None  # asked for weights of matrix products only
        return layout


def stored_parts(layout: Layout, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, int]]]:
    """Dtype and shape of the tensors in a QuantizedWeight [out_features, in_features], by the names of its fields."""
    rows, inputs = shape
    groups = inputs // layout.group_size
    parts = {
        "scales": ("F32", (rows, groups)),
        "values": ("U8" if layout.bits == 4 else "I8", (rows, inputs * layout.bits // 8)),
    }
    return parts | ({"zeros": ("U8", (rows, groups))} if layout.zeros else {})
