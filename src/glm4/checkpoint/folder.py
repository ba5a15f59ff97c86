"""A model folder on disk: its small files, read strictly, and what is wrong with it, said in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

from glm4.errors import CheckpointError, ConfigError
from glm4.files import decode, read_bytes, read_json

ARCHITECTURE = "Glm4ForCausalLM"
MODEL_TYPE = "glm4"

_RUNS = f"this program runs the GLM-4-0414 family ({ARCHITECTURE}, model_type {MODEL_TYPE})"
_EXAMPLE = "zai-org/GLM-4-9B-0414"

_RELATIVES = {
    "chatglm": "ChatGLM and the first GLM-4-9B",
    "glm": "GLM-Edge and GLM-4-9B-chat-hf",
    "glm4v": "GLM-4.1V",
    "glm4_moe": "GLM-4.5 and later",
}
"""Models that are easily taken for one of ours, by model_type."""

_PARTIAL_SUFFIXES = (".incomplete", ".part", ".aria2")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A Hugging Face folder whose config.json is that of a GLM-4-0414 model; its weights are not looked at yet."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """The folder at `path`; symbolic links are followed and "~" is the user's home.

        Raises CheckpointError for a folder that is not there, not readable, half downloaded or in another format;
        ConfigError for a config.json that is missing, malformed or of another architecture.
        """
        folder = cls(Path(os.path.expanduser(path)))  # noqa: PTH111 - Path.expanduser raises for unknown users
        names = _list_folder(folder.path, str(path))
        _refuse_partial_download(folder.path)
        if "config.json" not in names:
            _explain_missing_config(folder.path, names)
        config = folder.read_json("config.json")
        _check_architecture(config, folder.path / "config.json")
        return folder

    @overload
    def read_json(self, name: str, required: Literal[True] = True) -> dict[str, Any]: ...

    @overload
    def read_json(self, name: str, required: bool) -> dict[str, Any] | None: ...

    def read_json(self, name: str, required: bool = True) -> dict[str, Any] | None:
        """The JSON object in file `name`; None where the file is missing and not `required`.

        Raises ConfigError, with line and column, for anything that is not one JSON object in UTF-8.
        """
        return read_json(self.path / name, required)

    @overload
    def read_text(self, name: str, required: Literal[True] = True) -> str: ...

    @overload
    def read_text(self, name: str, required: bool) -> str | None: ...

    def read_text(self, name: str, required: bool = True) -> str | None:
        """The text in file `name`; None where the file is missing and not `required`.

        Raises ConfigError for a file that is not UTF-8.
        """
        data = read_bytes(self.path / name, required)
        return None if data is None else decode(data, self.path / name)

    def file_names(self) -> list[str]:
        """Names of the folder's files and folders, sorted."""
        return _list_folder(self.path, str(self.path))

    def refuse_without_safetensors(self) -> NoReturn:
        """Raise the CheckpointError that says what the folder holds in place of safetensors weights."""
        _explain_missing_weights(self.path, self.file_names())


def _list_folder(path: Path, given: str) -> list[str]:
    if not given:
        raise CheckpointError("no model folder given: pass the path of one, such as -m /path/GLM-4-9B-0414")
    try:
        return sorted(entry.name for entry in path.iterdir())
    except NotADirectoryError as error:
        raise CheckpointError(f"{given} is a file: give the folder that holds it") from error
    except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(_not_there(given)) from error
    except OSError as error:
        raise CheckpointError(f"{given} cannot be read: {error.strerror}") from error


def _not_there(given: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", given, re.ASCII):
        name = given.rpartition("/")[2]
        return f"{given} is not a folder here: fetch it with `glm4 download {given}`, then use `-m {name}`"
    return f"{given!r} is not there: give the path of a model folder, or fetch one with `glm4 download {_EXAMPLE}`"


def _refuse_partial_download(path: Path) -> None:
    for file in _files_of_downloads(path):
        if file.suffix in _PARTIAL_SUFFIXES:
            raise CheckpointError(
                f"{path} is half downloaded ({file.relative_to(path)}): run the same download again to finish it, "
                "or remove that file if nothing is missing"
            )


def _files_of_downloads(path: Path) -> Iterator[Path]:
    """The folder's own files, then those that huggingface_hub keeps below it while it downloads."""
    yield from sorted(path.iterdir())
    yield from sorted((path / ".cache" / "huggingface" / "download").rglob("*"))


def _explain_missing_config(path: Path, names: list[str]) -> NoReturn:
    snapshots = sorted((path / "snapshots").glob("*/config.json"))
    if snapshots:
        raise CheckpointError(f"{path} is a download cache: give the folder inside it, {snapshots[0].parent}")
    if any(name.endswith(".gguf") for name in names):
        _explain_missing_weights(path, names)
    raise ConfigError(
        f"{path} has no config.json: give a Hugging Face model folder, or fetch one with `glm4 download {_EXAMPLE}`"
    )


def _explain_missing_weights(path: Path, names: list[str]) -> NoReturn:
    advice = "fetch the safetensors files with `glm4 download`"
    for name in names:
        if name.endswith(".gguf"):
            raise CheckpointError(f"{path} holds GGUF weights ({name}), which this program does not read: {advice}")
    for name in names:
        if name.endswith((".bin", ".pt", ".pth", ".ckpt")):
            raise CheckpointError(
                f"{path} holds pickled weights ({name}), which can run code when they are loaded: "
                f"convert them to safetensors, or {advice}"
            )
    raise CheckpointError(f"{path} has no weights (*.safetensors): {advice} into this folder")


def _check_architecture(config: dict[str, Any], where: Path) -> None:
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if not architectures and not model_type:
        raise ConfigError(f"{where} names no architecture and no model_type: {_RUNS}")
    if architectures and architectures != [ARCHITECTURE]:
        found = ", ".join(map(str, architectures)) if isinstance(architectures, list) else str(architectures)
    elif model_type and model_type != MODEL_TYPE:
        found = f"model_type {model_type}"
    else:
        return
    known = _RELATIVES.get(str(model_type))
    raise ConfigError(f"{where} is of another model, {found}{f' ({known})' if known else ''}: {_RUNS}")
