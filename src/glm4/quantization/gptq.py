"""GPTQ folders (Frantar et al., "GPTQ: Accurate Post-Training Quantization", 2022), as GPTQModel and AutoGPTQ write.

qweight int32 [in·bits/32, out]: a word holds consecutive inputs of one output, the first in the lowest bits.
qzeros int32 [groups, out·bits/32]: likewise for consecutive outputs. scales float [groups, out]. g_idx int32 [in]: the
group of each input, by turns unless `desc_act` let the quantiser take the inputs in an order of its own.
`checkpoint_format` "gptq", the first, stores every zero point less 1; "gptq_v2" stores them as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm4.ops.quantized import QuantizedWeight
from glm4.quantization.layout import Layout, stored_layout
from glm4.quantization.quantize import unpack_nibbles
from glm4.quantization.stored import FLOATS, Part, Settings, StoredFormat, by_turns, hold, words_as_bytes

_ONE_IN_EVERY_FIELD = {4: 0x11111111, 8: 0x01010101}


class Gptq(StoredFormat):
    """4 or 8 bits; weights whose inputs were reordered are dequantised."""

    method = "gptq"
    marker = "qweight"

    def __init__(self, settings: Settings) -> None:
        self.bits: int = settings.one_of("bits", 4, 8)
        self.group_size = settings.group_size()
        self.reordered: bool = settings.one_of("desc_act", False, True, default=False) and self.group_size != -1
        self.symmetric: bool = settings.one_of("sym", True, False, default=True)
        self.first_version = settings.one_of("checkpoint_format", "gptq", "gptq_v2", default="gptq") == "gptq"
        settings.one_of("pack_dtype", "int32", default="int32")
        for pattern, changes in (settings.values.get("dynamic") or {}).items():
            if changes and not pattern.startswith("-:"):
                settings.refuse(f"dynamic gives {pattern!r} settings of its own, which is not supported")

    def _group_size(self, inputs: int) -> int:
        return inputs if self.group_size == -1 else self.group_size

    def layout(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        inputs = shape[1]
        return None if self.reordered else stored_layout(self.bits, self._group_size(inputs), inputs, self.symmetric)

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, Part]:
        outputs, inputs = shape
        groups = -(-inputs // self._group_size(inputs))
        return {
            "qweight": Part(("I32",), ((inputs * self.bits // 32, outputs),)),
            "qzeros": Part(("I32",), ((groups, outputs * self.bits // 32),)),
            "scales": Part(FLOATS, ((groups, outputs),)),
            "g_idx": Part(("I32",), ((inputs,),), optional=not self.reordered),
        }

    def read(self, name: str, shape: tuple[int, ...], part: Callable[[str], Tensor]) -> QuantizedWeight | Tensor:
        outputs, inputs = shape
        scales, words = part("scales"), part("qzeros")
        if self.first_version:
            words = words + _ONE_IN_EVERY_FIELD[self.bits]  # of whole words, as the writers subtract it
        zeros = words_as_bytes(words).flatten(1)
        zeros = unpack_nibbles(zeros) if self.bits == 4 else zeros
        values = words_as_bytes(part("qweight")).transpose(0, 1).reshape(outputs, -1)
        group_of = self._group_of(inputs, len(scales), part)
        return hold(self.layout(name, shape), self.bits, values, scales.t(), zeros.t(), group_of)

    def _group_of(self, inputs: int, groups: int, part: Callable[[str], Tensor]) -> Tensor:
        in_order = by_turns(inputs, self._group_size(inputs))
        try:
            group_of = part("g_idx").long()
        except KeyError:
            return in_order
        if not self.reordered and not torch.equal(group_of, in_order):
            raise ValueError("has its inputs in an order of their own (g_idx), although desc_act is false")
        if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
            raise ValueError(f"puts an input (g_idx) into a group that is not among its {groups}")
        return group_of
