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
from typing import BinaryIO

from torch import Tensor

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import INDEX_NAME, SINGLE_NAME, Checkpoint
from glm4.errors import OptionError, OutputError
from glm4.quantization.packed import Packed, stored_parts
from glm4.quantization.weights import Weights

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_COPIED_NAMES = ("LICENSE", "NOTICE")
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
    header, places, size = _header(_entries(checkpoint, weights, shapes))
    free = shutil.disk_usage(path.parent).free
    if free < len(header) + size:
        raise OutputError(f"{path.parent.parent} has {free:,} bytes free, and {size:,} are needed: make room first")
    with path.open("wb") as file:
        file.write(header)
        for name in shapes:
            weight = weights.read(name)
            if isinstance(weight, Tensor):
                _write(file, places[name], weight)
            else:
                for field in stored_parts(weights.layouts[name], shapes[name]):
                    _write(file, places[f"{name}.{field}"], getattr(weight, field))
            weights.release(name)
            on_weight(name)
        file.flush()
        os.fsync(file.fileno())
    return size


def _entries(checkpoint: Checkpoint, weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """Every tensor of the file."""
    entries: dict[str, Entry] = {}
    for name, shape in shapes.items():
        layout = weights.layouts.get(name)
        if layout is None:
            entries[name] = checkpoint.info(name).dtype, shape
        else:
            entries |= {f"{name}.{field}": entry for field, entry in stored_parts(layout, shape).items()}
    return entries


def _header(entries: Mapping[str, Entry]) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a safetensors file, each tensor's place in it, and the bytes of all tensors.

    Tensors with longer numbers come first, so that all are aligned.
    """
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    position = 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda item: -_BYTES[item[1][0]]):
        end = position + prod(shape) * _BYTES[dtype]
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        begins[name], position = position, end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}, position


def _write(file: BinaryIO, place: int, tensor: Tensor) -> None:
    tensor = tensor.contiguous()
    file.seek(place)
    file.write((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
