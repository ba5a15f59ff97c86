"""The word between the ranks of one replica: a connection from its leader to each follower.

Each frame is one byte of kind, four of length (big-endian), then that many bytes. A connection that closes is a rank
that is gone; one on which nothing comes for the time limit is a rank that hangs.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

import msgspec

from glm4 import errors
from glm4.errors import EngineError, Glm4Error

_HEADER = struct.Struct(">BI")
_READ_BYTES = 1 << 18
_SLICE = 0.1
"""Seconds of waiting between two looks at what else could have happened."""
_HEARTBEATS = 6
"""Signs of life within the time limit."""


class Kind(IntEnum):
    """What a frame holds."""

    ALIVE = 0
    HELLO = 1
    READY = 2
    BEGIN = 3
    LOADING = 4
    LOADED = 5
    PLAN = 6
    RESULT = 7
    FAILED = 8


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Who a follower is."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """What a rank found, before it loads weights."""

    fingerprint: str
    """Of the model folder and the options: the same on every rank."""
    num_blocks: int
    """Blocks of the KV cache for which it has room."""


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """A Glm4Error: the name of its class, and its line."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: Glm4Error) -> Failure:
        """What `error` is on the wire."""
        return cls(type(error).__name__, str(error))

    def error(self, who: str = "") -> Glm4Error:
        """The same error again, a new object each time; `who` stands before its text."""
        kind: type[Glm4Error] = getattr(errors, self.kind)
        return kind(who + self.text)


class PeerGone(Exception):
    """The other end of a connection is closed."""


class PeerCutOff(PeerGone):
    """The other end cannot be reached any more, whatever has become of it."""

    @classmethod
    def of(cls, error: OSError) -> PeerGone:
        """What an error on a connection says of its other end."""
        return PeerGone() if isinstance(error, BrokenPipeError | ConnectionResetError) else cls()


class Channel:
    """Frames over one socket. Sending is safe from several threads; receiving is for one."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        """timeout: seconds without an answer from the other machine after which the connection counts as cut."""
        self._sock, self._lock, self._buffer = sock, threading.Lock(), bytearray()
        self._frames: deque[tuple[Kind, bytes]] = deque()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.heard = time.monotonic()
        """When anything came last."""
        if sock.family != socket.AF_UNIX:
            third = max(1, int(timeout / 3))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (
                ("TCP_KEEPIDLE", third),
                ("TCP_KEEPINTVL", max(1, third // 3)),
                ("TCP_KEEPCNT", 3),
                ("TCP_USER_TIMEOUT", 2000 * third),  # milliseconds
            ):
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send one frame; waits while the other end is behind. Raises PeerGone."""
        try:
            with self._lock:
                self._sock.sendall(_HEADER.pack(kind, len(payload)) + payload)
        except OSError as error:
            raise PeerCutOff.of(error) from error

    def receive(self, wait: float) -> tuple[Kind, bytes] | None:
        """The next frame but ALIVE, or None if none comes within `wait` seconds. Raises PeerGone."""
        end = time.monotonic() + wait
        while not self._frames:
            left = end - time.monotonic()
            if not self._read(max(left, 0.0)) and left <= 0:
                return None
        return self._frames.popleft()

    def look(self) -> None:
        """Take in what has come, without waiting. Raises PeerGone when nothing more will."""
        self._read(0.0)

    def peek(self, kind: Kind) -> bytes | None:
        """Take out the first frame of `kind` among those taken in."""
        for i, (found, payload) in enumerate(self._frames):
            if found is kind:
                del self._frames[i]
                return payload
        return None

    def _read(self, wait: float) -> bool:
        """Take in what comes within `wait` seconds; whether anything did."""
        if not self._poll.poll(1000 * wait):
            return False
        try:
            data = self._sock.recv(_READ_BYTES)
        except OSError as error:
            raise PeerCutOff.of(error) from error
        if not data:
            raise PeerGone
        self.heard = time.monotonic()
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            if kind != Kind.ALIVE:
                self._frames.append((Kind(kind), bytes(memoryview(self._buffer)[_HEADER.size : end])))
            del self._buffer[:end]
        return True

    def close(self) -> None:
        """Hang up: the other end sees it at once."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _silence(names: list[str], seconds: float) -> str:
    have = "has" if len(names) == 1 else "have"
    return (
        f"{' and '.join(names)} {have} not answered for {seconds:g} s: look at what that rank said last, or raise "
        "rank_timeout where a step takes longer"
    )


class Leader:
    """The leader's end: a channel to each follower, and a thread that tells them that it is alive."""

    def __init__(self, channels: Mapping[int, Channel], names: Mapping[int, Hello], timeout: float) -> None:
        """channels, names: by rank; timeout: seconds of silence after which a rank that should speak is lost."""
        self._channels, self._names, self._timeout = dict(channels), dict(names), timeout
        self._lost: Glm4Error | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._stay_alive, name="glm4 heartbeat", daemon=True).start()

    def _stay_alive(self) -> None:
        while not self._closed.wait(self._timeout / _HEARTBEATS):
            for channel in self._channels.values():
                with suppress(PeerGone):  # `check` finds it
                    channel.send(Kind.ALIVE)

    def tell(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a frame to every follower. Raises EngineError, naming it, when one is lost."""
        self.check()
        for rank, channel in self._channels.items():
            try:
                channel.send(kind, payload)
            except PeerGone:
                raise self._lose(rank) from None

    def hear(self, kind: Kind, on_other: Callable[[int, Kind, bytes], None] | None = None) -> dict[int, bytes]:
        """One frame of `kind` from each follower, by rank; frames of other kinds go to `on_other`.

        Raises EngineError when a follower is lost, or says nothing at all within the time limit, and the error that a
        follower ended with.
        """
        found: dict[int, bytes] = {}
        start = time.monotonic()
        while missing := [rank for rank in self._channels if rank not in found]:
            for rank in missing:
                found |= self._hear_one(rank, kind, on_other)
            silent = [
                rank for rank in self._channels
                if rank not in found and time.monotonic() - max(start, self._channels[rank].heard) > self._timeout
            ]  # fmt: skip
            if silent:
                self._lost = EngineError(self.silence(silent))
                raise self._lost
        return found

    def _hear_one(self, rank: int, kind: Kind, on_other: Callable[[int, Kind, bytes], None] | None) -> dict[int, bytes]:
        self.check()
        frame = self._receive(rank, _SLICE / len(self._channels))
        if frame is None:
            return {}
        if frame[0] is kind:
            return {rank: frame[1]}
        if on_other is not None:
            on_other(rank, *frame)
        return {}

    def hear_from(self, rank: int, kind: Kind) -> bytes:
        """The next frame of `kind` from one follower; raises as `hear` does."""
        start = time.monotonic()
        while True:
            self.check()
            frame = self._receive(rank, _SLICE)
            if frame is not None and frame[0] is kind:
                return frame[1]
            if time.monotonic() - start > self._timeout:
                self._lost = EngineError(self.silence([rank]))
                raise self._lost

    def _receive(self, rank: int, wait: float) -> tuple[Kind, bytes] | None:
        """The next frame of one follower, as `Channel.receive`; raises as `check` does."""
        try:
            frame = self._channels[rank].receive(wait)
        except PeerGone:
            raise self._lose(rank) from None
        if frame is not None and frame[0] is Kind.FAILED:
            raise self._fail(rank, frame[1])
        return frame

    def check(self) -> None:
        """Raise the EngineError of a follower that is lost, or the error that one ended with."""
        if self._lost is not None:
            raise self._lost
        for rank, channel in self._channels.items():
            try:
                channel.look()
            except PeerGone:
                payload = channel.peek(Kind.FAILED)
                raise (self._lose(rank) if payload is None else self._fail(rank, payload)) from None
            if (payload := channel.peek(Kind.FAILED)) is not None:
                raise self._fail(rank, payload)

    def silence(self, ranks: list[int]) -> str:
        """The line for ranks that should have spoken."""
        return _silence([str(self._names[rank]) for rank in ranks], self._timeout)

    def _lose(self, rank: int) -> Glm4Error:
        self._lost = EngineError(
            f"{self._names[rank]} is gone: it was killed, or its machine cannot be reached; load the model again"
        )
        return self._lost

    def _fail(self, rank: int, payload: bytes) -> Glm4Error:
        failure = msgspec.msgpack.decode(payload, type=Failure)
        self._lost = failure.error(f"{self._names[rank]}: ")
        return self._lost

    def close(self) -> None:
        """Hang up on every follower, which ends it."""
        self._closed.set()
        for channel in self._channels.values():
            channel.close()


class LeaderGone(Exception):
    """The leader has hung up between two steps: there is no more to do."""


@dataclass(slots=True)
class Follower:
    """A follower's end."""

    channel: Channel
    leader: int
    timeout: float
    """Seconds without a sign of life after which the leader is lost."""

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a frame to the leader. Raises as `receive` does."""
        try:
            self.channel.send(kind, payload)
        except PeerGone as error:
            raise self._gone(error) from error

    def fail(self, error: Glm4Error) -> None:
        """Tell the leader why this rank ends."""
        with suppress(LeaderGone, EngineError):  # it knows, or has ended for a reason of its own
            self.send(Kind.FAILED, msgspec.msgpack.encode(Failure.of(error)))

    def receive(self) -> tuple[Kind, bytes]:
        """The next frame, however long it takes.

        Raises LeaderGone at the end, EngineError for a leader that hangs or cannot be reached.
        """
        while True:
            try:
                frame = self.channel.receive(min(1.0, self.timeout / _HEARTBEATS))
            except PeerGone as error:
                raise self._gone(error) from error
            if frame is not None:
                return frame
            self._check_heard()

    def _gone(self, error: PeerGone) -> Exception:
        if isinstance(error, PeerCutOff):
            return EngineError(f"rank {self.leader} cannot be reached any more: look at its machine and the network")
        return LeaderGone()

    def silence(self, ranks: list[int]) -> str:
        """The line for ranks that should have spoken, of which a follower knows no more than the numbers."""
        return _silence([f"rank {rank}" for rank in ranks], self.timeout)

    def check(self) -> None:
        """Raise EngineError when the leader is gone in the middle of a step, or hangs."""
        try:
            self.channel.look()
        except PeerGone:
            raise EngineError(
                f"rank {self.leader} has ended in the middle of a step, or cannot be reached: look at what it said last"
            ) from None
        self._check_heard()

    def _check_heard(self) -> None:
        if time.monotonic() - self.channel.heard > self.timeout:
            raise EngineError(
                f"rank {self.leader} has given no sign of life for {self.timeout:g} s: it hangs, or its machine "
                "cannot be reached"
            )

    def close(self) -> None:
        """Hang up."""
        self.channel.close()
