"""The ranks of a model, as one process takes part in them: how they start, meet, agree and end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import TCPStore, rendezvous  # type: ignore[attr-defined]

from glm4.errors import CheckpointError, EngineError, Glm4Error, OptionError
from glm4.options import EngineOptions
from glm4.parallel.collectives import ALONE, Collectives, make_collectives
from glm4.parallel.control import Channel, Follower, Hello, Kind, Leader, PeerGone, Ready
from glm4.parallel.exit_status import exit_in_words
from glm4.parallel.followers import LOOPBACK, Followers
from glm4.parallel.network import interface_towards
from glm4.parallel.world import Degrees, Place

T = TypeVar("T")

_START_SECONDS = 300.0
"""How long ranks may take to find each other, …"""
_OWN_START_SECONDS = 60.0
"""… and those that this process has started itself, unless rank_timeout is longer."""
_ONE_GROUP = "this process has a model over several ranks already: close it first, or start a new process"
_HELLO_SECONDS = 5.0
_EXIT_SECONDS = 2.0
"""How long followers may take to leave: they hold nothing that a kill would lose."""
_SLICE = 0.1
"""Seconds of waiting between two looks at whether the others are still there."""
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
"""By kind of device."""


def join_ranks(options: EngineOptions, followers: Followers | None) -> Ranks | None:
    """Meet the other ranks of `options`: `followers`, unless a launcher started them (RANK is set). None: alone.

    Raises OptionError where the degrees do not go with the processes that there are, and EngineError when a rank does
    not come.
    """
    degrees = Degrees(options.tensor_parallel, options.pipeline_parallel, options.data_parallel)
    launched = "RANK" in os.environ
    if launched:
        place = Place.from_environment(degrees)
    elif degrees.data > 1:
        raise OptionError(
            f"data_parallel {degrees.data}: an LLM is one copy of the model; start the copies with glm4 serve, glm4 "
            "batch or glm4 launch"
        )
    else:
        place = Place(0, degrees.product, 0, degrees.product, degrees)
    if degrees.product == 1:
        return None
    if dist.is_initialized():
        raise EngineError(_ONE_GROUP)
    return _meet_launched(place, options) if followers is None else _meet_followers(place, options, followers)


def _meet_launched(place: Place, options: EngineOptions) -> Ranks:
    address = os.environ.get("MASTER_ADDR", LOOPBACK)
    store, _, _ = next(rendezvous("env://", place.rank, place.world_size, timeout=_seconds(_START_SECONDS)))
    if not place.is_leader:
        return Ranks(place, options, _greet(place, options, store), store, address)
    with socket.create_server((_own_address(address), 0)) as listener:
        store.set(_key(place), "{}:{}".format(*listener.getsockname()[:2]))
        return Ranks(place, options, _welcome(place, options, listener, [], _START_SECONDS), store, address)


def _meet_followers(place: Place, options: EngineOptions, followers: Followers) -> Ranks:
    store = TCPStore(
        LOOPBACK, followers.store.getsockname()[1], None, is_master=True, wait_for_workers=False,
        master_listen_fd=followers.store.detach(),
    )  # fmt: skip
    with followers.listener as listener:
        store.set(_key(place), "{}:{}".format(*listener.getsockname()[:2]))
        processes, seconds = followers.processes, max(_OWN_START_SECONDS, options.rank_timeout)
        leader = _welcome(place, options, listener, processes, seconds)
        return Ranks(place, options, leader, store, LOOPBACK, processes)


def _welcome(
    place: Place,
    options: EngineOptions,
    listener: socket.socket,
    processes: list[subprocess.Popen[bytes]],
    seconds: float,
) -> Leader:
    """The leader's end, once every follower has said who it is, for which they have so many `seconds`."""
    channels: dict[int, Channel] = {}
    names: dict[int, Hello] = {}
    end = time.monotonic() + seconds
    listener.settimeout(0.1)
    while missing := [rank for rank in place.replica_ranks[1:] if rank not in names]:
        for process, rank in zip(processes, place.replica_ranks[1:], strict=False):
            if process.poll() is not None:
                raise EngineError(f"rank {rank} {exit_in_words(process.returncode)} before it had begun: start again")
        if time.monotonic() > end:
            listed = " and ".join(map(str, missing))
            raise EngineError(f"rank {listed} has not come within {seconds:g} s: see what it said last, or start it")
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        channel = Channel(connection, options.rank_timeout)
        try:
            frame = channel.receive(_HELLO_SECONDS)
        except PeerGone:
            continue
        if frame is None or frame[0] is not Kind.HELLO:
            channel.close()  # not one of ours
            continue
        hello = msgspec.msgpack.decode(frame[1], type=Hello)
        channels[hello.rank], names[hello.rank] = channel, hello
    return Leader(channels, names, options.rank_timeout)


def _greet(place: Place, options: EngineOptions, store: Store) -> Follower:
    """A follower's end."""
    host, _, port = store.get(_key(place)).decode().rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), _START_SECONDS)
    except OSError as error:
        raise EngineError(f"rank {place.leader} at {host} cannot be reached: {error.strerror}") from error
    connection.settimeout(None)
    channel = Channel(connection, options.rank_timeout)
    follower = Follower(channel, place.leader, options.rank_timeout)
    follower.send(Kind.HELLO, msgspec.msgpack.encode(Hello(place.rank, socket.gethostname(), os.getpid())))
    return follower


class Ranks:
    """All ranks of one replica, as this process takes part in them."""

    def __init__(
        self,
        place: Place,
        options: EngineOptions,
        control: Leader | Follower,
        store: Store,
        address: str,
        processes: Sequence[subprocess.Popen[bytes]] = (),
    ) -> None:
        """store: reaches all ranks, from `address`; processes: those of the followers, where this one started them."""
        self.place, self.control = place, control
        self.collectives: Collectives = ALONE
        self._options, self._store, self._address, self._processes = options, store, address, processes
        self._sending: tuple[Any, torch.Tensor] | None = None
        """What the next stage has perhaps not taken yet; it must stay in memory until then."""
        self._has_group = False
        """torch's process group is this model's."""
        self._closed = False

    def connect(self, device: torch.device) -> None:
        """Open what the ranks compute together with."""
        if self.place.degrees.product > self.place.degrees.tensor:  # else it is known later whether there is need of it
            self._open_group(device)
        self.collectives = make_collectives(
            self.place, device, self._store, self._options.rank_timeout, self.control.check,
            lambda: self._open_group(device),
        )  # fmt: skip

    def _open_group(self, device: torch.device) -> None:
        """torch's process group of all ranks, once. In a thread, for torch waits for ranks that are lost until the time
        limit; after a failure this process can open no other."""
        if self._has_group:
            return
        if dist.is_initialized():  # another thread's model was quicker
            raise EngineError(_ONE_GROUP)
        hook = sys.excepthook  # torch's own would mark every line of all that this program prints of an error
        failures: list[Exception] = []

        def open_group() -> None:
            try:
                with _gloo_interface(self._address):
                    dist.init_process_group(
                        _BACKENDS[device.type],
                        store=PrefixStore("glm4", self._store),
                        rank=self.place.rank,
                        world_size=self.place.world_size,
                        timeout=_seconds(self._options.rank_timeout),
                    )
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=open_group, name="glm4 process group", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(_SLICE)
                self.control.check()
        finally:
            sys.excepthook = hook
        for error in failures:
            raise EngineError(f"the ranks cannot reach each other: {str(error).splitlines()[0]}") from error
        self._has_group = True

    def agree(self, fingerprint: str, num_blocks: int) -> int:
        """Blocks of the KV cache on every rank: as many as the one with the least room has.

        Raises CheckpointError for a rank whose model folder or options are others than the leader's.
        """
        ready = Ready(fingerprint, num_blocks)
        if isinstance(self.control, Follower):
            self.control.send(Kind.READY, msgspec.msgpack.encode(ready))
            kind, payload = self.control.receive()
            assert kind is Kind.BEGIN
            return msgspec.msgpack.decode(payload, type=int)
        for rank, payload in self.control.hear(Kind.READY).items():
            other = msgspec.msgpack.decode(payload, type=Ready)
            if other.fingerprint != fingerprint:
                raise CheckpointError(
                    f"rank {rank} has another model than rank {self.place.rank}: its folder's config.json, list of "
                    "weights or its options differ; copy the folder again"
                )
            num_blocks = min(num_blocks, other.num_blocks)
        self.control.tell(Kind.BEGIN, msgspec.msgpack.encode(num_blocks))
        return num_blocks

    def loading(self) -> None:
        """A sign of life while the weights load."""
        if isinstance(self.control, Follower):
            self.control.send(Kind.LOADING)
        else:
            self.control.check()

    def loaded(self) -> None:
        """Wait until every rank has its weights."""
        if isinstance(self.control, Follower):
            self.control.send(Kind.LOADED)
        else:
            self.control.hear(Kind.LOADED)

    def receive_stage(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The residual stream from the stage before."""
        x = torch.empty(shape, dtype=dtype, device=device)
        self._transfer(lambda: dist.recv(x, self.place.previous), self.place.previous)
        return x

    def send_stage(self, x: torch.Tensor) -> None:
        """The residual stream to the stage after, which need not be ready for it: that is waited for the next time."""
        if self._sending is not None:
            work, _ = self._sending
            self._transfer(work.wait, self.place.next)
        x = x.contiguous()
        self._sending = self._transfer(lambda: dist.isend(x, self.place.next), self.place.next), x

    def _transfer(self, transfer: Callable[[], T], peer: int | None) -> T:
        assert peer is not None
        try:
            return transfer()
        except RuntimeError as error:
            self.control.check()  # names the rank that is lost, if it knows
            raise EngineError(self.control.silence([peer])) from error

    def fail(self, error: Glm4Error) -> None:
        """Tell the others why this rank ends."""
        if isinstance(self.control, Follower):
            self.control.fail(error)

    def close(self, *, at_once: bool = False) -> None:
        """End the followers, and give back what the ranks held together; calling it again does nothing.

        at_once: without a last word from those that this process has started.
        """
        if self._closed:
            return
        self._closed = True
        self.control.close()
        self.collectives.close()
        if self._has_group:
            dist.destroy_process_group()
        end = time.monotonic() + (0.0 if at_once else _EXIT_SECONDS)
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _key(place: Place) -> str:
    return f"glm4/control/{place.leader}"


def _seconds(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def _own_address(other: str) -> str:
    """This machine's address on the way to `other`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return str(probe.getsockname()[0])


@contextmanager
def _gloo_interface(address: str) -> Iterator[None]:
    """gloo looks up the host's name to find its interface, which may be none of those that lead to the others."""
    name = "GLOO_SOCKET_IFNAME"
    interface = interface_towards(address)
    if name in os.environ or interface is None:
        yield
        return
    os.environ[name] = interface
    try:
        yield
    finally:
        del os.environ[name]
