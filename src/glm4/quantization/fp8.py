"""Folders in 8-bit floats (e4m3) without more structure: one scale a tensor, or one a block, as DeepSeek introduced.

weight F8_E4M3 [out, in]; weight_scale_inv float [⌈out/rows⌉, ⌈in/columns⌉] where `weight_block_size` is
[rows, columns], else weight_scale, one number. Both are multiplied with, whatever their names say. Scales of
activations are passed over: activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from glm4.quantization.layout import Layout
from glm4.quantization.stored import FLOATS, Part, Settings, StoredFormat, scale_floats

ONE_NUMBER: tuple[tuple[int, ...], ...] = ((), (1,))


class Fp8(StoredFormat):
    """Dequantised: few processors compute in 8-bit floats."""

    method = "fp8"

    def __init__(self, settings: Settings) -> None:
        settings.one_of("fmt", "e4m3", default="e4m3")
        self.block = block_size(settings, "weight_block_size") if settings.values.get("weight_block_size") else None
        self.marker = "weight_scale_inv" if self.block else "weight_scale"

    def layout(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        return None

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, Part]:
        (outputs, inputs), (rows, columns) = shape, self.block or shape
        scales = ((-(-outputs // rows), -(-inputs // columns)),) if self.block else ONE_NUMBER
        return {
            "weight": Part(("F8_E4M3",), (shape,)),
            self.marker: Part(FLOATS, scales),
            "input_scale": Part(FLOATS, ONE_NUMBER, optional=True),
        }

    def read(self, name: str, shape: tuple[int, ...], part: Callable[[str], Tensor]) -> Tensor:
        scales = part(self.marker)
        block = self.block or (shape[0], shape[1])
        return scale_floats(part("weight"), scales if self.block else scales.view(1, 1), block)


def block_size(settings: Settings, key: str) -> tuple[int, int]:
    """[rows, columns] that share a scale. Raises ConfigError for anything else."""
    value = settings.values.get(key)
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        settings.refuse(f"{key} {value!r} is not [rows, columns]")
    return value[0], value[1]
