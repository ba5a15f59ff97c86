r"""The prompts behind `predict_data`: texts as they are, or a file with one prompt a line.

As in MindSpore Transformers, the two characters `\n` in a prompt stand for a newline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from glm4.errors import PromptError

_STARTS_LIKE_PATH = re.compile(r"(?:\.{1,2}|~)?/(?!/)")
_ENDS_LIKE_PATH = re.compile(r"[^/\s]\.(?:txt|text|jsonl?|md|csv|tsv|log|ya?ml)\Z", re.IGNORECASE)
_NOT_IN_A_PATH = re.compile(r"[\s，。？！；：、“”?!]")


def read_prompts(values: Sequence[str]) -> tuple[str, ...]:
    """The prompts that `values` stand for: several values, or one that names no file, are the prompts themselves.

    Raises PromptError for an empty prompt, text that is not UTF-8, a blank line inside a file, a file that cannot
    be read, a file among several values, and a value that looks like a path to nothing.
    """
    for value in values:
        path = _as_path(value)
        if path and len(values) == 1:
            return tuple(_read_file(path))
        if path:
            raise PromptError(
                f"predict_data {value} is a file, and so only it can be given: put the prompts into one file"
            )
    return tuple(
        _prompt(value, "predict_data" + (f"[{i}]" if len(values) > 1 else "")) for i, value in enumerate(values)
    )


def _prompt(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{where}: the prompt is not UTF-8 text; convert it first") from error
    prompt = text.replace(r"\n", "\n")
    if not prompt.strip():
        raise PromptError(f"{where}: the prompt is empty; write a question")
    return prompt


def _as_path(value: str) -> Path | None:
    """The file that `value` names, or None where it is a prompt."""
    starts, ends = bool(_STARTS_LIKE_PATH.match(value)), bool(_ENDS_LIKE_PATH.search(value))
    looks_like_path = (starts and ends) or ((starts or ends) and not _NOT_IN_A_PATH.search(value))
    try:
        path = Path(value).expanduser()
        if path.is_dir() and "/" in value:
            raise PromptError(f"predict_data {value} is a folder: name a file with one prompt a line")
        if path.exists() and not path.is_dir():
            return path
        looks_like_path |= "/" in value.strip("/") and path.parent.is_dir() and not _NOT_IN_A_PATH.search(value)
    except (OSError, ValueError, RuntimeError):
        pass  # nothing can have this name (too long, a NUL) or we may not look: the spelling alone decides
    if looks_like_path:
        raise PromptError(
            f"predict_data {value}: no such file (it looks like a path; if it is a prompt, begin it with a space)"
        )
    return None


def _read_file(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"predict_data {path} cannot be read: {error.strerror}") from error
    lines = data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n")
    if lines == [b""]:
        raise PromptError(f"predict_data {path} is empty: write one prompt a line")
    prompts = []
    for number, line in enumerate(lines, 1):
        where = f"predict_data {path}:{number}"
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise PromptError(f"{where}: not UTF-8 text; save the file as UTF-8") from error
        if not text.strip():
            raise PromptError(f"{where}: a blank line; every line is one prompt, so take it out")
        prompts.append(_prompt(text, where))
    return prompts
