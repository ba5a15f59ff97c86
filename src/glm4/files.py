"""Reading the small files of a model folder, strictly; what is wrong with one is said in one line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal, overload

from glm4.errors import CheckpointError, ConfigError

_LFS_POINTER = b"version https://git-lfs"
_LFS_POINTER_MAX_BYTES = 1024


@overload
def read_bytes(file: Path, required: Literal[True] = True) -> bytes: ...


@overload
def read_bytes(file: Path, required: bool) -> bytes | None: ...


def read_bytes(file: Path, required: bool = True) -> bytes | None:
    """The content of `file`; None where there is no such file and it is not `required`.

    Raises ConfigError when it is missing or cannot be read, and CheckpointError for a Git LFS pointer.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        if not required:
            return None
        raise ConfigError(f"{file} is missing: fetch it with `glm4 download` into this folder") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; correct its permissions or path") from error
    refuse_lfs_pointer(file, data)
    return data


@overload
def read_json(file: Path, required: Literal[True] = True) -> dict[str, Any]: ...


@overload
def read_json(file: Path, required: bool) -> dict[str, Any] | None: ...


def read_json(file: Path, required: bool = True) -> dict[str, Any] | None:
    """The JSON object in `file`; raises what `read_bytes` and `parse_json` raise."""
    data = read_bytes(file, required)
    return None if data is None else parse_json(data, file)


def parse_json(data: bytes, where: str | Path) -> dict[str, Any]:
    """The JSON object in `data`; each key may stand once. Raises ConfigError, which starts with `where`."""
    text = decode(data, where)
    if not text.strip():
        raise ConfigError(f"{where} is empty: fetch it again")
    try:
        value = json.loads(text, object_pairs_hook=_object_without_duplicates)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{where} is not valid JSON: {error.msg} at {place}") from error
    except ValueError as error:  # a key that stands twice, or a number of thousands of digits
        raise ConfigError(f"{where} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is not valid JSON: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where} holds a {type(value).__name__}, not a JSON object {{…}}")
    return value


def refuse_lfs_pointer(path: Path, first_bytes: bytes) -> None:
    """Raise CheckpointError where `path` is what `git clone` without Git LFS leaves in place of a large file."""
    if len(first_bytes) <= _LFS_POINTER_MAX_BYTES and first_bytes.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in that folder, "
            "or fetch it with `glm4 download`"
        )


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} stands twice")
    return result


def decode(data: bytes, where: str | Path) -> str:
    """The text in `data`. Raises ConfigError, which starts with `where`, when it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}") from error


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of a foreign error, fit to stand inside one of ours."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "…"
