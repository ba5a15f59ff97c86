"""The other ranks of a model on this machine, started as soon as its options are known: they load torch beside it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass

import msgspec

from glm4.errors import EngineError
from glm4.options import EngineOptions

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Followers:
    """Ranks 1, 2, … of one replica, and the sockets on which they look for its leader."""

    processes: list[subprocess.Popen[bytes]]
    store: socket.socket
    """For torch's store, which they ask where the leader is."""
    listener: socket.socket

    def kill(self) -> None:
        """End them all."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.store.close()
        self.listener.close()


def start_followers(options: EngineOptions) -> Followers | None:
    """Start the other ranks of `options`; None where there are none, or where a launcher did (RANK is set).

    Raises EngineError where the system gives no process.
    """
    size = options.tensor_parallel * options.pipeline_parallel
    if "RANK" in os.environ or size == 1 or options.data_parallel > 1:
        return None
    followers = Followers([], socket.create_server((LOOPBACK, 0)), socket.create_server((LOOPBACK, 0)))
    try:
        for rank in range(1, size):
            followers.processes.append(_start_follower(size, rank, options, followers.store.getsockname()[1]))
    except BaseException:
        followers.kill()
        raise
    return followers


def _start_follower(size: int, rank: int, options: EngineOptions, port: int) -> subprocess.Popen[bytes]:
    """One of `size` ranks. It takes its options from standard input, and is in a session of its own, so that Ctrl-C
    reaches only the leader."""
    boot = f"import sys; sys.path[:] = {sys.path!r}; from glm4.engine.follower_process import main; main({os.getpid()})"
    said = {
        "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
    }  # fmt: skip
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", boot],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {name: str(value) for name, value in said.items()},
        )  # fmt: skip
    except OSError as error:
        raise EngineError(f"rank {rank} cannot be started: {error.strerror}; free some memory") from error
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(msgspec.msgpack.encode(options))
    return process
