"""Raw tensors out of safetensors files, through read-only memory maps and without a tensor library.

The format (https://github.com/huggingface/safetensors#format): the length of the header as 8 bytes, little endian;
the header, a JSON object that gives dtype, shape and place of every tensor; the bytes of the tensors, without gaps.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

from glm4.checkpoint.folder import ModelFolder
from glm4.errors import CheckpointError
from glm4.files import parse_json, refuse_lfs_pointer

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

MAX_HEADER_BYTES = 100_000_000
"""The limit that the format sets."""

_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 8
_AGAIN = "run `glm4 download` into this folder again"

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of one element, by the format's dtype tags."""

_LOADABLE = ("BF16", "F32")
_HARMLESS = re.compile(r".*\brotary_emb\.inv_freq")
"""Buffers that old versions of transformers saved and that are computed from config.json."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor."""

    name: str
    dtype: str
    """The format's tag, such as "BF16"."""
    shape: tuple[int, ...]
    file: Path
    begin: int
    """Offset of its first byte in the file."""
    end: int
    """Offset after its last byte in the file."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor's bytes, row major and little endian: a read-only view of the file, not a copy."""

    dtype: str
    shape: tuple[int, ...]
    buffer: memoryview


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    map: mmap.mmap
    header: bytes
    tensors: dict[str, TensorInfo]

    def advise(self, advice: int, begin: int, end: int) -> None:
        """Tell the kernel about bytes [begin, end) of the file; `begin` is a multiple of the page size."""
        if end > begin:
            self.map.madvise(advice, begin, end - begin)


class Checkpoint:
    """All weights of a model folder; only headers are read until a tensor is asked for.

    The maps are shared and read-only: processes on one machine that load the same folder hold it once, in the page
    cache, and a folder larger than the free memory can still be gone through. Views returned by `read` stay valid
    as long as they are held.
    """

    def __init__(self, folder: ModelFolder, shards: Mapping[str, _Shard]) -> None:
        self.folder = folder
        self._shards = shards
        self._infos = {name: info for shard in shards.values() for name, info in shard.tensors.items()}

    @classmethod
    def open(cls, folder: ModelFolder) -> Checkpoint:
        """The folder's weights: what its index names, or one model.safetensors, or a complete set of shards.

        Raises CheckpointError, naming file and tensor, unless every header is sound, every file as long as its
        header says, every tensor in exactly one file, and index and files agree.
        """
        index = folder.read_json(INDEX_NAME, required=False)
        weight_map = None if index is None else _weight_map(index, folder.path / INDEX_NAME)
        files = _files_without_index(folder) if weight_map is None else _files_of_index(folder, weight_map)
        shards = {file: _open_shard(folder.path / file) for file in files}
        _refuse_duplicates(shards.values())
        if weight_map is not None:
            _check_index(weight_map, shards)
        return cls(folder, shards)

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """What the header says about tensor `name`. Raises CheckpointError for a name that is not there."""
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"{self.folder.path} has no tensor {name!r}") from None

    def read(self, name: str) -> RawTensor:
        """Tensor `name`, without copying it. Raises CheckpointError for a name that is not there."""
        info = self.info(name)
        view = memoryview(self._shard(info).map)
        return RawTensor(info.dtype, info.shape, view[info.begin : info.end])

    def check(
        self, expected: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        """Compare the tensors with the names and shapes in `expected`, and their dtypes with BF16 and F32.

        dtypes: what a tensor may be instead, where the folder is quantised.

        Raises CheckpointError that names the first tensor in the way, its file, how many more there are, and what
        to do. Rotary frequencies saved by old versions of transformers are passed over.
        """
        found = {name: info for name, info in self._infos.items() if not _HARMLESS.fullmatch(name)}
        loadable = dtypes or {}
        _refuse_dtypes([info for name, info in found.items() if info.dtype not in loadable.get(name, _LOADABLE)])
        missing = [name for name in expected if name not in found]
        if missing:
            raise CheckpointError(
                f"{self.folder.path} has no tensor {missing[0]!r}{_and_more(missing)}, which its config.json asks "
                f"for: {_AGAIN}, or put the right config.json there"
            )
        extra = [info for name, info in found.items() if name not in expected]
        if extra:
            raise CheckpointError(
                f"{extra[0].file} holds tensor {extra[0].name!r}{_and_more(extra)}, which has no place in the model "
                "of its config.json: put the right config.json there"
            )
        wrong = [info for name, info in found.items() if info.shape != tuple(expected[name])]
        if wrong:
            raise CheckpointError(
                f"{wrong[0].file}: tensor {wrong[0].name!r}{_and_more(wrong)} has shape {list(wrong[0].shape)}, but "
                f"config.json asks for {list(expected[wrong[0].name])}: put the right config.json there, or {_AGAIN}"
            )

    def release(self, name: str) -> None:
        """Give back the process's pages of tensor `name`, once it has been copied; a later read maps them again."""
        info = self.info(name)
        begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE  # pages shared with a neighbour stay
        end = info.end - info.end % mmap.PAGESIZE
        self._shard(info).advise(mmap.MADV_DONTNEED, begin, end)

    def fingerprint(self) -> str:
        """SHA-256, in hex, of config.json and all headers: equal for ranks that load the same model."""
        digest = hashlib.sha256(self.folder.read_text("config.json").encode())
        for file, shard in sorted(self._shards.items()):
            for part in (file.encode(), shard.header):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def _shard(self, info: TensorInfo) -> _Shard:
        return self._shards[info.file.name]


def _weight_map(index: dict[str, Any], where: Path) -> dict[str, str]:
    """Tensor name to file name, out of an index; the file names are plain names."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map: {_AGAIN}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{where} puts tensor {name!r} into {file!r}, which is no .safetensors file name")
    return weight_map


def _files_of_index(folder: ModelFolder, weight_map: Mapping[str, str]) -> list[str]:
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder.path / file).is_file()]
    if len(missing) == len(files) and not _safetensors_in(folder):
        folder.refuse_without_safetensors()
    if missing:
        raise CheckpointError(
            f"{folder.path / missing[0]} is missing{_and_more(missing)}, but {INDEX_NAME} names it: {_AGAIN}"
        )
    _refuse_strays(folder, files, f"{INDEX_NAME} does not name it")
    return files


def _files_without_index(folder: ModelFolder) -> list[str]:
    present = _safetensors_in(folder)
    if not present:
        folder.refuse_without_safetensors()
    if SINGLE_NAME in present:
        _refuse_strays(folder, [SINGLE_NAME], f"{SINGLE_NAME} is there too")
        return [SINGLE_NAME]
    totals = {
        int(match[1]) for file in present if (match := re.fullmatch(r"model-\d{5}-of-(\d{5})\.safetensors", file))
    }
    if len(totals) != 1:
        raise CheckpointError(f"{folder.path} has neither {SINGLE_NAME} nor {INDEX_NAME}: {_AGAIN}")
    total = totals.pop()
    files = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    missing = [file for file in files if file not in present]
    if missing or not files:
        first = missing[0] if missing else INDEX_NAME
        raise CheckpointError(f"{folder.path / first} is missing{_and_more(missing)}: {_AGAIN}")
    _refuse_strays(folder, files, "it does not belong to the set of shards")
    return files


def _safetensors_in(folder: ModelFolder) -> list[str]:
    """The folder's weight files; "consolidated…" files are copies of them in another layout, which some hubs add."""
    names = folder.file_names()
    return [name for name in names if name.endswith(".safetensors") and not name.startswith("consolidated")]


def _refuse_strays(folder: ModelFolder, files: list[str], reason: str) -> None:
    strays = [file for file in _safetensors_in(folder) if file not in files]
    if strays:
        raise CheckpointError(
            f"{folder.path / strays[0]}{_and_more(strays)} would be left unread, because {reason}: move it elsewhere"
        )


def _open_shard(path: Path) -> _Shard:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(file, size, path)
            tensors = _parse_header(header, path)
            described = max((info.end for info in tensors.values()), default=_LENGTH_BYTES + len(header))
            if size < described:
                raise CheckpointError(f"{path} is cut off: it has {size:,} of {described:,} bytes: {_AGAIN}")
            if size > described:
                raise CheckpointError(
                    f"{path} is damaged: it has {size:,} bytes, its header describes {described:,}: {_AGAIN}"
                )
            return _Shard(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), header, tensors)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_header(file: BinaryIO, size: int, path: Path) -> bytes:
    start = file.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    if len(start) == _LENGTH_BYTES and length <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        return file.read(length)
    refuse_lfs_pointer(path, start + file.read(64))
    raise CheckpointError(f"{path} is no safetensors file, or damaged ({size:,} bytes): {_AGAIN}")


def _parse_header(header: bytes, path: Path) -> dict[str, TensorInfo]:
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path} is no safetensors file, or damaged: its header is not JSON: {_AGAIN}")
    entries = parse_json(header, f"{path}: the header")
    entries.pop("__metadata__", None)
    base = _LENGTH_BYTES + len(header)
    tensors = [_parse_entry(name, entry, base, path) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    position = base
    for info in tensors:
        if info.begin != position:
            what = "overlaps the one before it" if info.begin < position else "has a gap before it"
            _damaged(path, info.name, what)
        position = info.end
    return {info.name: info for info in tensors}


def _parse_entry(name: str, entry: Any, base: int, path: Path) -> TensorInfo:
    if not isinstance(entry, dict):
        _damaged(path, name, "is not described by an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        _damaged(path, name, f"has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        _damaged(path, name, f"has the shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _damaged(path, name, f"has the data_offsets {offsets!r}")
    begin, end = offsets
    if math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
        _damaged(path, name, f"({dtype}, shape {shape}) does not fit its {end - begin:,} bytes")
    return TensorInfo(name, dtype, tuple(shape), path, base + begin, base + end)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of whole numbers that fit 64 bits; JSON's true is an int to Python, and is not one."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**64 for item in value)


def _damaged(path: Path, name: str, what: str) -> NoReturn:
    raise CheckpointError(f"{path} is damaged: tensor {name!r} {what}: {_AGAIN}")


def _refuse_duplicates(shards: Iterable[_Shard]) -> None:
    homes: dict[str, Path] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in homes:
                raise CheckpointError(f"tensor {name!r} is both in {homes[name]} and in {shard.path}: {_AGAIN}")
            homes[name] = shard.path


def _check_index(weight_map: Mapping[str, str], shards: Mapping[str, _Shard]) -> None:
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise CheckpointError(
                f"{shards[file].path} has no tensor {name!r}, but {INDEX_NAME} puts it there: {_AGAIN}"
            )
    for shard in shards.values():
        for name in shard.tensors:
            if name not in weight_map:
                raise CheckpointError(f"{shard.path} holds tensor {name!r}, which {INDEX_NAME} does not name: {_AGAIN}")


def _refuse_dtypes(infos: list[TensorInfo]) -> None:
    if not infos:
        return
    first = infos[0]
    start = f"{first.file}: tensor {first.name!r}{_and_more(infos)} is {first.dtype}"
    if first.dtype == "F16":
        raise CheckpointError(f"{start}: GLM-4 overflows in float16 and answers '!!!!'; convert the folder to bfloat16")
    raise CheckpointError(f"{start}, a quantised or unsupported number format: use a folder in BF16 or F32")


def _and_more(things: list[Any]) -> str:
    return f" (and {len(things) - 1} more)" if len(things) > 1 else ""
