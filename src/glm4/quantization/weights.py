"""The weights of a folder, one at a time: as they are stored, or quantised on the way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4.checkpoint.safetensors_reader import Checkpoint, RawTensor
from glm4.errors import CheckpointError, ConfigError, OptionError
from glm4.ops.cpu.panels import PanelWeight
from glm4.ops.quantized import QuantizedWeight
from glm4.quantization import slices
from glm4.quantization.awq import Awq
from glm4.quantization.compressed_tensors import CompressedTensors
from glm4.quantization.fp8 import Fp8
from glm4.quantization.gptq import Gptq
from glm4.quantization.layout import GROUP_SIZES, HEAD, Cut, Layout, chosen_layout, chosen_layouts, is_linear
from glm4.quantization.packed import Packed
from glm4.quantization.quantize import quantize
from glm4.quantization.stored import FLOATS, Part, Settings, StoredFormat

Shape = tuple[int, ...]

_FORMATS: tuple[type[StoredFormat], ...] = (Gptq, Awq, CompressedTensors, Fp8, Packed)
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def as_tensor(raw: RawTensor) -> Tensor:
    """A view of the file's memory, mapped read-only: writing to it in place ends the process with a segfault."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(raw.buffer, dtype=TORCH_DTYPES[raw.dtype]).view(raw.shape)


def read_format(config: Mapping[str, Any], where: Path) -> StoredFormat | None:
    """How the weights beside `config`, the content of the file `where`, are quantised; None: they are not.

    Raises ConfigError that names what is not supported.
    """
    key = "quantization_config" if config.get("quantization_config") else "compression_config"
    values = config.get(key)
    if not values:
        return None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {key} is {values!r}, not an object: take the file from the original model folder")
    method = values.get("quant_method", "compressed-tensors" if key == "compression_config" else None)
    for format in _FORMATS:
        if format.method == method:
            return format(Settings(values, str(where)))
    raise ConfigError(
        f"{where}: the weights are quantised by {method or 'an unnamed method'}, which this program does not read "
        f"(it reads {', '.join(format.method for format in _FORMATS[:-1])}): use the bfloat16 folder, with "
        "--quantization int4 or int8"
    )


def expected_layouts(
    format: StoredFormat | None, shapes: Mapping[str, Shape], quantization: str, group_size: int = GROUP_SIZES[0]
) -> dict[str, Layout]:
    """How the weights of a folder will be held, as far as its config.json tells: what `Weights.layouts` is."""
    found: dict[str, Layout] = chosen_layouts(shapes, quantization, group_size)
    for name, shape in shapes.items():
        if format and is_linear(name) and (name != HEAD or format.includes_head):
            layout = format.layout(name, shape)
            if layout is not None:
                found[name] = layout
    return found


class Weights:
    """The weights that a model asks for, from a folder of any format, quantised where `quantization` says so."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shapes: Mapping[str, Shape],
        quantization: str = "none",
        group_size: int = GROUP_SIZES[0],
    ) -> None:
        """shapes: every weight of the model, whole; group_size: inputs that share a scale of int4 weights.

        Raises ConfigError for a format that is not read, and OptionError for a folder whose weights are quantised in
        another way than `quantization` says.
        """
        self._checkpoint, self._shapes = checkpoint, shapes
        folder = checkpoint.folder
        self._format = read_format(folder.read_json("config.json"), folder.path / "config.json")
        self._names = set(checkpoint.names())
        self._quantized = {
            name
            for name in shapes
            if self._format and is_linear(name) and _module(name) + self._format.marker in self._names
        }
        self.layouts: dict[str, Layout] = {}
        """How each weight is held that is not in the number format of the arithmetic."""
        for name, shape in shapes.items():
            layout = self._layout(name, shape, quantization, group_size)
            if layout is not None:
                self.layouts[name] = layout

    def _layout(self, name: str, shape: Shape, quantization: str, group_size: int) -> Layout | None:
        chosen = chosen_layout(name, shape, quantization, group_size)
        stored = self._format.layout(name, shape) if self._format and name in self._quantized else None
        if self._format and stored and chosen and stored.bits != chosen.bits:
            raise OptionError(
                f"quantization {quantization}: the weights of {self._checkpoint.folder.path} are quantised already, to "
                f"{stored.bits} bits ({self._format.method}): leave the option out"
            )
        return stored or chosen

    def check(self) -> None:
        """Raise CheckpointError unless the folder holds exactly these weights, in number formats that are read."""
        expected: dict[str, Shape] = {}
        dtypes: dict[str, tuple[str, ...]] = {}
        for name, shape in self._shapes.items():
            if name not in self._quantized:
                expected[name] = shape
                if self._format:
                    dtypes[name] = FLOATS
                continue
            for full_name, part in self._parts(name):
                dtypes[full_name] = part.dtypes
                if self._has(full_name):
                    found = self._checkpoint.info(full_name).shape
                    expected[full_name] = found if found in part.shapes else part.shapes[0]
                elif not part.optional:
                    expected[full_name] = part.shapes[0]
        self._checkpoint.check(expected, dtypes)

    def read(self, name: str, cut: Cut | None = None) -> Tensor | QuantizedWeight | PanelWeight:
        """Weight `name` on the CPU, as `layouts` says, or a part of it: the same numbers as in the whole.

        One that is neither quantised nor stored so is a view, unless the part is several ranges; so is a PanelWeight.
        Raises CheckpointError for a weight that cannot be quantised, or whose parts contradict each other.
        """
        layout = self.layouts.get(name)
        try:
            weight = self._part(self._stored(name), layout, cut)
        except ValueError as error:
            raise CheckpointError(
                f"{self._checkpoint.folder.path}: weight {name!r} {error}: the folder is damaged, fetch it again"
            ) from error
        if isinstance(weight, PanelWeight):
            return weight
        if isinstance(weight, Tensor) and cut is not None and name in self._quantized:
            weight = weight.clone()  # a view would keep all of the numbers that were made for it
        if not self.is_mapped(name) or (cut is not None and len(cut.ranges) > 1):  # of views, pages are read again
            self.release(name)
        return weight

    def is_mapped(self, name: str) -> bool:
        """Whether the file holds the numbers as they are read, so that rows or columns of them are not copied."""
        return name not in self.layouts and name not in self._quantized

    def _part(
        self, weight: Tensor | QuantizedWeight | PanelWeight, layout: Layout | None, cut: Cut | None
    ) -> Tensor | QuantizedWeight | PanelWeight:
        if isinstance(weight, PanelWeight):
            return weight if cut is None else slices.quantized_part(weight.unpack(), cut)
        if isinstance(weight, Tensor) and layout is None:
            return weight if cut is None else slices.part(weight, cut)
        if isinstance(weight, Tensor) and layout is not None:
            if cut is not None and cut.on_boundaries(layout.group_size):
                return quantize(slices.part(weight, cut).contiguous(), layout)
            weight = quantize(weight, layout)
        assert isinstance(weight, QuantizedWeight)
        return weight if cut is None else slices.quantized_part(weight, cut)

    def release(self, name: str) -> None:
        """Give back the pages of the file that hold weight `name`, once it has been copied."""
        names = [full_name for full_name, _ in self._parts(name)] if name in self._quantized else [name]
        for full_name in filter(self._has, names):
            self._checkpoint.release(full_name)

    def _stored(self, name: str) -> Tensor | QuantizedWeight | PanelWeight:
        if self._format is None or name not in self._quantized:
            return as_tensor(self._checkpoint.read(name))

        def stored_part(end: str) -> Tensor:
            if not self._has(_module(name) + end):
                raise KeyError(end)
            return as_tensor(self._checkpoint.read(_module(name) + end))

        return self._format.read(name, self._shapes[name], stored_part)

    def _parts(self, name: str) -> Iterator[tuple[str, Part]]:
        assert self._format is not None
        for end, part in self._format.parts(name, self._shapes[name]).items():
            yield _module(name) + end, part

    def _has(self, name: str) -> bool:
        return name in self._names


def _module(name: str) -> str:
    return name.removesuffix("weight")
