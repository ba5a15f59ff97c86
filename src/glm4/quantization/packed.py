"""The packed folder that `glm4 quantize` writes: a model folder whose linear weights are already in 4 or 8 bits.

It is a Hugging Face folder with one model.safetensors, and in config.json

    "quantization_config": {"quant_method": "glm4", "format_version": 2, "quantization": "int4", "group_size": 128}

from which `chosen_layout` tells how each weight is held. The weight `M.weight` is in `M.weight.values`,
`M.weight.scales` and `M.weight.zeros`: the tensors of a PanelWeight, which every CPU's kernels read where they lie in
the mapped file. (Version 1 had them by rows, and loading was repacking.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from glm4.errors import ConfigError
from glm4.ops.cpu.panels import PanelWeight, panel_shapes
from glm4.quantization.layout import GROUP_SIZES, Layout, chosen_layout
from glm4.quantization.stored import Part, Settings, StoredFormat

FORMAT_VERSION = 2


class Packed(StoredFormat):
    """Read without copying or computing anything."""

    method = "glm4"
    marker = "weight.values"
    includes_head = True

    def __init__(self, settings: Settings) -> None:
        version = settings.values.get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{settings.where}: quantization_config: format_version {version!r} is not supported (supported: "
                f"{FORMAT_VERSION}): run `glm4 quantize` on the bfloat16 folder again"
            )
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
        return {f"weight.{field}": Part(dtypes, (size,)) for field, (dtypes, size) in fields.items()}

    def read(self, name: str, shape: tuple[int, ...], part: Callable[[str], Tensor]) -> PanelWeight:
        layout = self._layout(name, shape)
        tensors = {field: part(f"weight.{field}") for field in stored_parts(layout, shape)}
        rows, inputs = shape
        return PanelWeight(rows, inputs, layout.bits, layout.group_size, **tensors)

    def _layout(self, name: str, shape: tuple[int, ...]) -> Layout:
        layout = self.layout(name, shape)
        assert layout is not None  # asked for weights of matrix products only
        return layout


def stored_parts(layout: Layout, shape: tuple[int, ...]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Dtypes and shape of the tensors in a PanelWeight [out_features, in_features], by the names of its fields."""
    rows, inputs = shape
    values, scales = panel_shapes(rows, inputs, layout.bits, layout.group_size)
    parts: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "values": (("U8",), values),
        "scales": (("F32", "F16"), scales),
    }
    return parts | ({"zeros": (("U8",), scales)} if layout.zeros else {})
