"""The answers as MindSpore Transformers gives them: a printed line, and a file of one dict a batch."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from glm4.errors import OutputError

RESULT_KEY = "text_generation_text"


def answer_line(texts: Sequence[str]) -> str:
    """One batch for the terminal: the texts as they are."""
    return f"'{RESULT_KEY}': [{', '.join(texts)}]"


def check_writable(path: Path) -> None:
    """Find out now, not after minutes of work, that `write_results` could not write there.

    Raises OutputError.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder, and the result file must have that name: move it away")
    with _temporary_beside(path):
        pass


def write_results(path: Path, batches: Sequence[Sequence[str]]) -> None:
    """Write `[{'text_generation_text': ['…', …]}, …]`, one dict a batch; `ast.literal_eval` reads it back.

    The file is replaced in one step when the new one is safely on disk, so whatever goes wrong leaves the old
    one as it was. Raises OutputError.
    """
    with _temporary_beside(path) as file:
        file.write(repr([{RESULT_KEY: list(texts)} for texts in batches]) + "\n")
        file.flush()
        os.fsync(file.fileno())
        Path(file.name).replace(path.resolve())


@contextmanager
def _temporary_beside(path: Path) -> Iterator[TextIO]:
    """A new file in the folder of `path`, gone at the end unless it was moved away."""
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            try:
                yield file
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "start from another folder"
        old = "; the file that was there is unchanged" if target.exists() else ""
        raise OutputError(f"{target} cannot be written: {error.strerror}; {advice}{old}") from error
