"""The two files of a batch: requests that are read line by line, and records that are appended, one write each.

A record's `id` says which request it answers, so that the output alone tells what is done:

    batch_req_7_3fa94c0d12ab77e1_9c8d7e6f
              │        │             └ the settings it was answered under
              │        └ hash of the request's line
              └ number of that line
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4.errors import OptionError, OutputError, PromptError
from glm4.interrupts import interrupts_held

STANDARD = "-"
_PREFIX = "batch_req_"
_ID = re.compile(rf"{_PREFIX}(\d+)_([0-9a-f]{{16}})_([0-9a-f]{{8}})")
_START = b'{"id": "' + _PREFIX.encode()
_SYNC_SECONDS = 1.0
"""What a power failure may cost; a kill costs nothing that was written."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request as the input has it."""

    number: int
    """Counted from 1, blank lines included."""
    data: bytes

    @property
    def fingerprint(self) -> int:
        """64 bits of a hash of its bytes."""
        return int.from_bytes(hashlib.sha256(self.data).digest()[:8], "big")


def record_id(line: Line, settings: str) -> str:
    """The id of the record that answers `line` under `settings`, 8 hexadecimal digits."""
    return f"{_PREFIX}{line.number}_{line.fingerprint:016x}_{settings}"


def settings_digest(*settings: object) -> str:
    """8 hexadecimal digits that stand for everything that, beside its line, decides an answer."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


class BatchInput:
    """A file of requests, or standard input, read one line at a time."""

    def __init__(self, name: str) -> None:
        """`name`: a path, or "-". Raises PromptError where it cannot be read."""
        self.title = "standard input" if name == STANDARD else name
        self.path = None if name == STANDARD else Path(name)
        self.rereadable = self.path is not None and self.path.is_file()
        """It can be read twice, so a run can be resumed; a pipe cannot."""
        if self.path is not None and (self.path.is_dir() or not self.path.exists()):
            what = "is a folder" if self.path.is_dir() else "is not there"
            raise PromptError(f"{name} {what}: name a file with one JSON request a line")

    def lines(self) -> Iterator[Line]:
        """The lines that are not blank, without their line ends."""
        try:
            with sys.stdin.buffer if self.path is None else self.path.open("rb") as file:
                for number, data in enumerate(file, 1):
                    data = (data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data).strip()
                    if data:
                        yield Line(number, data)
        except OSError as error:
            raise PromptError(f"{self.title} cannot be read: {error.strerror}") from error

    def fingerprints(self) -> array[int]:
        """Line.fingerprint at [number - 1]; 0 where a line is blank. Raises PromptError without a single request."""
        found = array("Q")
        for line in self.lines():
            found.extend([0] * (line.number - len(found) - 1))
            found.append(line.fingerprint)
        if not found:
            raise PromptError(f"{self.title} is empty: write one JSON request a line")
        return found


class BatchOutput:
    """The file of records, or standard output: nothing that was written is lost, torn or written twice."""

    def __init__(self, name: str) -> None:
        """`name`: a path, or "-". What is in it stays, until `resume` or `clear` is called. Raises OutputError."""
        self.title = "standard output" if name == STANDARD else name
        self.done: set[int] = set()
        """Numbers of the lines that have their record."""
        self.num_errors = 0
        """How many of the records, earlier ones included, are errors."""
        try:
            self._fd = os.dup(1) if name == STANDARD else os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self.is_file = name != STANDARD and stat.S_ISREG(os.fstat(self._fd).st_mode)
            """It keeps what is written, so a run can be resumed; a pipe does not."""
            if self.is_file:
                self._lock()
            self._size = os.lseek(self._fd, 0, os.SEEK_END) if self.is_file else 0
        except OSError as error:
            raise OutputError(f"{self.title} cannot be written: {error.strerror}; choose another file") from error
        self._synced = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{self.title} is being written by another `glm4 batch`: wait for it") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # some file systems have no locks
                raise

    @property
    def is_empty(self) -> bool:
        """No record is in it yet."""
        return self._size == 0

    def is_same_file(self, path: Path) -> bool:
        """Whether `path` leads to this very file."""
        return self.is_file and os.path.samestat(os.fstat(self._fd), path.stat())

    def clear(self) -> None:
        """Forget what is in it."""
        if self.is_file:
            os.ftruncate(self._fd, 0)
            self._size = os.lseek(self._fd, 0, os.SEEK_SET)

    def resume(self, source: BatchInput, fingerprints: array[int], settings: str) -> None:
        """Find out what is done, and cut a record that a kill or a power failure left torn.

        Raises PromptError where a line of `source` has changed since, OptionError where the settings have, and
        OutputError for a file that holds something else.
        """
        end, number = 0, 0
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            for number, data in enumerate(file, 1):
                record = _parse_record(data)
                if record is None:
                    if number == 1 and not _is_beginning_of_record(data):
                        raise OutputError(
                            f"{self.title} holds something else than records of `glm4 batch`: choose another file"
                        )
                    break
                self._check(record["id"], source, fingerprints, settings)
                self.num_errors += bool(record["error"])
                end += len(data)
        self._size = end
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)

    def _check(self, identity: str, source: BatchInput, fingerprints: array[int], settings: str) -> None:
        match = _ID.fullmatch(identity)
        assert match is not None  # _parse_record has looked
        line = int(match[1])
        again = "use --restart to begin again, or choose another output"
        if line > len(fingerprints) or int(match[2], 16) != fingerprints[line - 1]:
            raise PromptError(f"{source.title}:{line} has changed since {self.title} was begun: {again}")
        if match[3] != settings:
            raise OptionError(
                f"{self.title} was begun with another model or other options (--raw, --option, --seed, --dtype, "
                f"--kv-cache-dtype, --max-model-len): give the same ones, {again}"
            )
        self.done.add(line)

    def write(self, line: int, record: dict[str, Any]) -> None:
        """Append the record of request `line`. Raises OutputError; what was written before stays whole."""
        # half of a surrogate pair, which UTF-8 has no bytes for, becomes JSON's own escape of it
        data = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with interrupts_held():  # a record that is written counts as done
            try:
                _write_all(self._fd, data)
                self._sync(at_least=_SYNC_SECONDS)
            except OSError as error:
                if error.errno == errno.EPIPE:  # the reader has gone, which is no failure of ours
                    raise
                raise self._failure(error) from error
            self._size += len(data)
            self.done.add(line)
            self.num_errors += bool(record["error"])

    def _sync(self, at_least: float) -> None:
        if self.is_file and time.monotonic() - self._synced >= at_least:
            os.fsync(self._fd)
            self._synced = time.monotonic()

    def _failure(self, error: OSError) -> OutputError:
        if self.is_file:
            with contextlib.suppress(OSError):  # a torn record is cut by the next run as well
                os.ftruncate(self._fd, self._size)
        return OutputError(
            f"{self.title} cannot be written: {error.strerror}; the {len(self.done)} records in it are whole, so free "
            "some space and run the same command again"
        )

    def close(self) -> None:
        """Let everything reach the disk. Raises OutputError."""
        try:
            self._sync(at_least=0)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(self._fd)


def _parse_record(data: bytes) -> dict[str, Any] | None:
    """The record in a line of the output; None where it is torn or something else."""
    if not data.endswith(b"\n"):
        return None
    try:
        record = json.loads(data)
    except ValueError:
        return None
    is_ours = isinstance(record, dict) and "error" in record and _ID.fullmatch(str(record.get("id")))
    return record if is_ours else None


def _is_beginning_of_record(data: bytes) -> bool:
    return data.startswith(_START) or _START.startswith(data)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
