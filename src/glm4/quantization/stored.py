"""What the readers of quantised folders share: their settings, and the arithmetic of what they find."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from glm4.errors import ConfigError
from glm4.ops.cpu.panels import PanelWeight
from glm4.ops.quantized import QuantizedWeight
from glm4.quantization.layout import Layout
from glm4.quantization.quantize import unpack_nibbles

FLOATS = ("F16", "BF16", "F32")
"""Number formats of scales, and of the weights that a quantised folder leaves as they are."""

_BLOCK = 1 << 24
"""Numbers dequantised at once: 64 MiB of float32."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a quantised weight, as the folder must hold it."""

    dtypes: tuple[str, ...]
    """Tags of safetensors, such as "I32"; any of them."""
    shapes: tuple[tuple[int, ...], ...]
    """Any of them."""
    optional: bool = False


class StoredFormat(ABC):
    """How a folder stores quantised weights, from its `quantization_config`.

    A weight [out_features, in_features] with the name `M.weight` is in several tensors, the parts, with names that
    begin with `M.`; a folder without the part `marker` for a weight holds it as it is.
    """

    method: ClassVar[str]
    """The name of the format, as `quant_method` has it."""
    marker: str
    includes_head: ClassVar[bool] = False
    """Whether the output head is quantised too, unless the folder shows otherwise."""

    @abstractmethod
    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError, which names the key, for what is not supported."""

    @abstractmethod
    def layout(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        """How the weight is held in memory; None: dequantised to bfloat16."""

    @abstractmethod
    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, Part]:
        """The tensors of the weight, by the end of their names."""

    @abstractmethod
    def read(
        self, name: str, shape: tuple[int, ...], part: Callable[[str], Tensor]
    ) -> QuantizedWeight | PanelWeight | Tensor:
        """The weight, from its parts: as `layout` says.

        Raises ValueError for parts that contradict the settings.
        """


class Settings:
    """`quantization_config`, with errors that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def refuse(self, what: str) -> NoReturn:
        """Raise the ConfigError that says `what` is not supported."""
        raise ConfigError(
            f"{self.where}: quantization_config: {what}: use the bfloat16 folder, with --quantization int4 or int8"
        )

    def one_of(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The value of `key`, which is one of `allowed` and of the same type; `default` where it is not said."""
        value = self.values.get(key)
        value = default if value is None else value
        if not any(value == known and type(value) is type(known) for known in allowed):
            listed = ", ".join(map(str, allowed))
            self.refuse(f"{key} {value!r} is not supported (supported: {listed})")
        return value

    def group_size(self, key: str = "group_size") -> int:
        """Inputs that share a scale; -1: all of them."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
            self.refuse(f"{key} {value!r} is not a number of inputs")
        return value


def words_as_bytes(words: Tensor) -> Tensor:
    """int32 [rows, n] → its bytes, uint8 [rows, n, 4], the lowest first."""
    return words.contiguous().view(torch.uint8).view(*words.shape, 4)


def by_turns(inputs: int, group_size: int) -> Tensor:
    """The group of each input, int64 [in]: the first `group_size` are in group 0, and so on."""
    return torch.arange(inputs) // group_size


def hold(
    layout: Layout | None, bits: int, values: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor
) -> QuantizedWeight | Tensor:
    """w = scale · (q - zero) as `layout` says, or dequantised to bfloat16 where there is none.

    values: uint8 [out, in] (bits 8), or [out, in // 2] with the even input in the low four bits (bits 4);
    scales: float [out, groups]; zeros: uint8 [out, groups]; group_of: int64 [in], each input's group, which goes by
    turns where there is a layout. Raises ValueError for zero points off the middle that `layout` has no place for.
    """
    if layout is None:
        return _dequantize(bits, values, scales.float(), zeros, group_of)
    if not layout.zeros and bool((zeros != 1 << (bits - 1)).any()):
        raise ValueError("has zero points, although its settings call it symmetric")
    copies = len(group_of) // layout.group_size // scales.shape[1]
    return QuantizedWeight(
        bits,
        layout.group_size,
        values if bits == 4 else (values ^ 128).view(torch.int8),
        scales.float().repeat_interleave(copies, dim=1),
        zeros.repeat_interleave(copies, dim=1) if layout.zeros else None,
    )


def _dequantize(bits: int, values: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Tensor:
    def rows(part: slice) -> Tensor:
        integers = unpack_nibbles(values[part]) if bits == 4 else values[part]
        return (integers.float() - zeros[part].float()[:, group_of]) * scales[part][:, group_of]

    return _by_rows(rows, len(values), len(group_of))


def scale_floats(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """weight: an 8-bit float [out, in] → bfloat16, each block of [rows, columns] times its own scale.

    scales: float [⌈out / rows⌉, ⌈in / columns⌉].
    """
    row_of, column_of = (torch.arange(size) // step for size, step in zip(weight.shape, block, strict=True))

    def rows(part: slice) -> Tensor:
        return weight[part].float() * scales[row_of[part]].float()[:, column_of]

    return _by_rows(rows, *weight.shape)


def _by_rows(rows: Callable[[slice], Tensor], count: int, width: int) -> Tensor:
    """bfloat16 [count, width] of what `rows` gives for its parts: few of them are float32 at a time."""
    result = torch.empty(count, width, dtype=torch.bfloat16)
    height = max(1, _BLOCK // width)
    for first in range(0, count, height):
        part = slice(first, min(first + height, count))
        result[part] = rows(part)
    return result
