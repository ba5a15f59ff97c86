"""AWQ folders (Lin et al., "AWQ: Activation-aware Weight Quantization", 2023), in AutoAWQ's order for `gemm`.

qweight int32 [in, out/8] and qzeros int32 [groups, out/8]: a word holds eight consecutive outputs, from the lowest four
bits on those with the numbers 0, 2, 4, 6, 1, 3, 5, 7. scales float [groups, out]. w = scale · (q - zero).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from glm4.ops.quantized import QuantizedWeight
from glm4.quantization.layout import Layout, stored_layout
from glm4.quantization.quantize import pack_nibbles, unpack_nibbles
from glm4.quantization.stored import FLOATS, Part, Settings, StoredFormat, by_turns, hold, words_as_bytes

_PLACE_OF_OUTPUT = [0, 4, 1, 5, 2, 6, 3, 7]


class Awq(StoredFormat):
    """4 bits with zero points."""

    method = "awq"
    marker = "qweight"

    def __init__(self, settings: Settings) -> None:
        settings.one_of("bits", 4)
        settings.one_of("version", "gemm", default="gemm")
        settings.one_of("zero_point", True, default=True)
        self.group_size = settings.group_size()

    def _group_size(self, inputs: int) -> int:
        return inputs if self.group_size == -1 else self.group_size

    def layout(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        return stored_layout(4, self._group_size(shape[1]), shape[1], symmetric=False)

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, Part]:
        outputs, inputs = shape
        groups = -(-inputs // self._group_size(inputs))
        return {
            "qweight": Part(("I32",), ((inputs, outputs // 8),)),
            "qzeros": Part(("I32",), ((groups, outputs // 8),)),
            "scales": Part(FLOATS, ((groups, outputs),)),
        }

    def read(self, name: str, shape: tuple[int, ...], part: Callable[[str], Tensor]) -> QuantizedWeight | Tensor:
        integers, zeros = (_outputs_first(part(name)) for name in ("qweight", "qzeros"))
        group_of = by_turns(shape[1], self._group_size(shape[1]))
        return hold(self.layout(name, shape), 4, pack_nibbles(integers), part("scales").t(), zeros, group_of)


def _outputs_first(words: Tensor) -> Tensor:
    """int32 [n, out/8] → uint8 [out, n]."""
    integers = unpack_nibbles(words_as_bytes(words))[..., _PLACE_OF_OUTPUT].flatten(1)
    return integers.t().contiguous()
