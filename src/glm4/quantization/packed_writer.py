"""Writes packed folders, one weight in memory at a time; nothing is at the target's place until all of it is."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

from torch import Tensor

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import INDEX_NAME, SINGLE_NAME, Checkpoint
from glm4.errors import OptionError, OutputError
from glm4.ops.cpu.panels import PanelWeight
from glm4.quantization.packed import Packed, stored_parts
from glm4.quantization.weights import TORCH_DTYPES, Weights

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_CACHE_LINE = 64
_TAGS = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}

Entry = tuple[str, tuple[int, ...]]
"""Dtype and shape of a tensor in the file."""


def write_packed(
    folder: ModelFolder,
    target: Path,
    shapes: Mapping[str, tuple[int, ...]],
    quantization: str,
    group_size: int,
    on_weight: Callable[[str], None] = lambda name: None,
) -> int:
    """Write `folder`, its weights rounded to `quantization` (int8 or int4), to `target`; returns the bytes of weights.

    shapes: every weight of the model. `on_weight` is called with the name of each once it is written.
    Raises OptionError for a folder that is quantised already, OutputError for a target that is there and not empty or
    cannot be written, and CheckpointError for a folder that cannot be read.
    """
    checkpoint = Checkpoint.open(folder)
    if Weights(checkpoint, shapes).layouts:
        raise OptionError(f"{folder.path} is quantised already: it loads as it is; give the bfloat16 folder")
    weights = Weights(checkpoint, shapes, quantization, group_size)
    weights.check()
    with _new_folder(target) as unfinished:
        size = _write_weights(unfinished / SINGLE_NAME, checkpoint, weights, shapes, on_weight)
        for name in folder.file_names():
            if name != INDEX_NAME and (name.endswith(_COPIED_SUFFIXES) or name.startswith(_COPIED_NAMES)):
                shutil.copyfile(folder.path / name, unfinished / name)
        config = folder.read_json("config.json")
        config.pop("compression_config", None)
        config["quantization_config"] = Packed.settings(quantization, group_size)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (unfinished / "config.json").write_text(text + "\n", encoding="utf-8")
    return size


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends, and is removed when it fails."""
    unfinished = target.with_name(target.name + ".incomplete")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise OutputError(f"{target} is there already: give the name of a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.mkdir()
        except FileExistsError as error:
            raise OutputError(
                f"{unfinished} is there: another run is writing it, or one was killed; remove it in that case"
            ) from error
        try:
            yield unfinished
            unfinished.rename(target)  # which may be there, if it is empty
        except BaseException:
            shutil.rmtree(unfinished)
            raise
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}") from error


def _write_weights(
    path: Path,
    checkpoint: Checkpoint,
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    on_weight: Callable[[str], None],
) -> int:
    largest = _largest_entries(checkpoint, weights, shapes)
    needed = sum(_size(*entry) for entry in largest.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OutputError(f"{path.parent.parent} has {free:,} bytes free, and {needed:,} are needed: make room first")
    with SafetensorsWriter(path, largest) as file:
        for name in shapes:
            weight = weights.read(name)
            if isinstance(weight, Tensor):
                file.write(name, weight)
            else:
                panels = weight if isinstance(weight, PanelWeight) else PanelWeight.pack(weight)
                for field in stored_parts(weights.layouts[name], shapes[name]):
                    file.write(f"{name}.{field}", getattr(panels, field))
            weights.release(name)
            on_weight(name)
    return file.size


def _largest_entries(
    checkpoint: Checkpoint, weights: Weights, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Entry]:
    """Every tensor of the file, in the largest number format that it may have."""
    entries: dict[str, Entry] = {}
    for name, shape in shapes.items():
        layout = weights.layouts.get(name)
        if layout is None:
            entries[name] = checkpoint.info(name).dtype, shape
        else:
            parts = stored_parts(layout, shape)
            entries |= {f"{name}.{field}": (dtypes[0], part_shape) for field, (dtypes, part_shape) in parts.items()}
    return entries


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * _BYTES[dtype]


class SafetensorsWriter:
    """A safetensors file that is written tensor by tensor, each beginning on a cache line, as kernels read it best.

    The format has no gaps. So those that do not fill whole cache lines are kept for the end, in memory: no large weight
    is among them.
    """

    def __init__(self, path: Path, largest: Mapping[str, Entry]) -> None:
        """largest: every tensor, in the largest number format that it may have; the header will fit in that place."""
        self.size = 0
        self._file = path.open("wb")
        self._entries: dict[str, dict[str, object]] = {}
        self._last: list[tuple[str, Tensor]] = []
        bound = {name: _entry(dtype, shape, 10**15, 10**15) for name, (dtype, shape) in largest.items()}
        self._room = len(_header(bound, 0))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._file:
            if kind is None:
                self._finish()

    def write(self, name: str, tensor: Tensor) -> None:
        """Add a tensor on the CPU. Raises OSError."""
        if tensor.nbytes % _CACHE_LINE:
            self._last.append((name, tensor.clone()))
        else:
            self._place(name, tensor)

    def _place(self, name: str, tensor: Tensor) -> None:
        tensor, begin = tensor.contiguous(), self.size
        self._file.seek(self._room + begin)
        self._file.write((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
        self.size += tensor.nbytes
        self._entries[name] = _entry(_TAGS[tensor.dtype], tuple(tensor.shape), begin, self.size)

    def _finish(self) -> None:
        for name, tensor in sorted(self._last, key=lambda item: -item[1].element_size()):  # so all are aligned
            self._place(name, tensor)
        self._file.seek(0)
        self._file.write(_header(self._entries, self._room))
        self._file.flush()
        os.fsync(self._file.fileno())


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _header(entries: Mapping[str, dict[str, object]], room: int) -> bytes:
    """The beginning of a file, filled up with spaces to `room` bytes, or to the next cache line."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text = text.ljust(room - 8)
    text += b" " * (-(8 + len(text)) % _CACHE_LINE)
    return len(text).to_bytes(8, "little") + text
