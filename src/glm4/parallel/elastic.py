"""The ranks of one machine as child processes, on torch's elastic launcher: started, heard, watched, stopped."""

from __future__ import annotations

import logging
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, SubprocessContext

from glm4.errors import EngineError, OutputError

_INTERVAL = 0.05
"""Seconds between two looks at the ranks."""
_SETTLE = 1.0
"""Seconds that a rank which says that another one is lost leaves for that one to be found."""
_GRACE = 3
"""Seconds from SIGTERM to SIGKILL."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

log = logging.getLogger("glm4.launch")


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank that ended as it should not."""

    rank: int
    pid: int
    code: int
    """As subprocess has it: minus the signal's number where one killed it."""


class Stopped(Exception):
    """The launcher itself was told to stop, by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class RankLogs(LogsSpecs):
    """Each rank's output goes through a pipe into its log; the first rank's also to the standard streams, as it comes.

    With pipes, both streams of a rank are in one file in the order in which they were written.
    """

    def __init__(self, paths: Mapping[int, Path], shown: bool) -> None:
        """paths: the log of each local rank. shown: whether local rank 0 is shown on this process's own streams."""
        super().__init__(str(paths[0].parent))
        self._error: OSError | None = None
        self._paths, self._shown = paths, shown
        self._read_ends: list[int] = []
        self._write_ends: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._files: list[BinaryIO] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._forward, name="glm4-logs", daemon=True)

    @property
    def root_log_dir(self) -> str:
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The pipes that the ranks write to, as paths that torch opens."""
        stdouts, stderrs = {}, {}
        for local_rank in envs:
            file = self._paths[local_rank].open("wb", buffering=0)
            self._files.append(file)
            if self._shown and local_rank == 0:
                stdouts[local_rank] = self._pipe(file, sys.stdout.fileno())
                stderrs[local_rank] = self._pipe(file, sys.stderr.fileno())
            else:
                stdouts[local_rank] = stderrs[local_rank] = self._pipe(file, None)
        return LogsDest(stdouts, stderrs)

    def _pipe(self, file: BinaryIO, shown_on: int | None) -> str:
        read_end, write_end = os.pipe()
        self._read_ends.append(read_end)
        self._write_ends.append(write_end)
        self._selector.register(read_end, selectors.EVENT_READ, (file, shown_on))
        return f"/dev/fd/{write_end}"

    def start(self) -> None:
        """Begin to forward, once the ranks have their ends of the pipes."""
        for write_end in self._write_ends:
            os.close(write_end)
        self._thread.start()

    def check(self) -> None:
        """Raise OutputError where something could not be written."""
        if self._error is not None:
            raise OutputError(f"what a rank says cannot be written: {self._error.strerror}") from self._error

    def stop(self) -> None:
        """Forward what is left of ranks that have ended."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        for read_end in self._read_ends:
            os.close(read_end)
        self._selector.close()
        for file in self._files:
            file.close()

    def _forward(self) -> None:
        while True:
            ready = self._selector.select(0.1)
            if not ready and self._ending.is_set():
                return
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:  # nobody has the other end any more
                    self._selector.unregister(key.fd)
                file, shown_on = key.data
                try:
                    file.write(data)
                    while shown_on is not None and data:
                        data = data[os.write(shown_on, data) :]
                except OSError as error:  # go on, so that no rank waits for its reader until it is stopped
                    self._error = self._error or error


def run_ranks(
    command: Sequence[str], environments: Mapping[int, dict[str, str]], logs: RankLogs, check: Callable[[], None]
) -> Failure | None:
    """Run `command` once in each environment until all have ended, or one has failed; then none is left.

    environments: by local rank, with RANK in them. check: called again and again; what it raises stops the ranks.
    Raises Stopped when this process is told to stop, and OutputError when what a rank says cannot be passed on.
    """
    starter = ("-I", "-S", str(Path(__file__).with_name("rank_process.py")), str(os.getpid()))
    context = SubprocessContext(
        "rank",
        sys.executable,
        dict.fromkeys(environments, (*starter, *command)),
        dict(environments),
        logs,
    )
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    try:
        context.start()
        told = _listen_to_signals()
        logs.start()
        processes = {int(environments[i]["RANK"]): handler.proc for i, handler in context.subprocess_handlers.items()}
        log.info("started %s", ", ".join(f"rank {rank} as process {p.pid}" for rank, p in processes.items()))
        settled: float | None = None
        while True:
            codes = {rank: process.poll() for rank, process in processes.items()}
            failed = [Failure(rank, processes[rank].pid, code) for rank, code in codes.items() if code]
            if None not in codes.values():
                return _first(failed) if failed else None
            if failed:
                settled = settled or time.monotonic() + _SETTLE
                if not _tells_of_another(_first(failed)) or time.monotonic() > settled:
                    return _first(failed)
            else:
                if told:
                    raise Stopped(told[0])
                logs.check()
                check()
            time.sleep(_INTERVAL)
    except SignalException as error:  # torch's own handler, before ours is in place
        raise Stopped(error.sigval) from error
    finally:
        _stop(context)
        logs.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen_to_signals() -> list[int]:
    """The numbers of the signals that come from now on, in place of torch's exceptions out of nowhere."""
    told: list[int] = []
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda came, frame: told.append(came))
    return told


def _first(failed: Sequence[Failure]) -> Failure:
    """The likeliest cause: a rank that was killed, then one with an error of its own, then one that lost another."""
    return min(failed, key=lambda failure: (_tells_of_another(failure), failure.code > 0, failure.rank))


def _tells_of_another(failure: Failure) -> bool:
    return failure.code == EngineError.exit_code


def _stop(context: SubprocessContext) -> None:
    """End all ranks, and what they have left running in their process groups."""
    context.close(signal.SIGTERM, _GRACE)
    for handler in context.subprocess_handlers.values():
        with suppress(ProcessLookupError):
            os.killpg(handler.proc.pid, signal.SIGKILL)
