"""The connections between the ranks of a replica: what arrives, who is lost, who hangs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from glm4.errors import CheckpointError, EngineError
from glm4.parallel.control import Channel, Follower, Hello, Kind, Leader, LeaderGone, PeerGone

TIMEOUT = 0.6


def pair() -> tuple[Channel, Channel]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    return Channel(near, TIMEOUT), Channel(far, TIMEOUT)


@pytest.fixture
def ends() -> Iterator[tuple[Leader, dict[int, Follower]]]:
    """A leader and its followers 1 and 2."""
    pairs = {rank: pair() for rank in (1, 2)}
    names = {rank: Hello(rank, "there", 4000 + rank) for rank in pairs}
    leader = Leader({rank: near for rank, (near, _) in pairs.items()}, names, TIMEOUT)
    yield leader, {rank: Follower(far, 0, TIMEOUT) for rank, (_, far) in pairs.items()}
    leader.close()
    for _, far in pairs.values():
        far.close()


def test_frames_arrive_whole_and_in_order() -> None:
    near, far = pair()
    payloads = [b"", b"x", bytes(range(256)) * 5000, b"last"]
    sender = threading.Thread(target=lambda: [far.send(Kind.PLAN, payload) for payload in payloads])
    sender.start()
    assert [near.receive(5.0) for _ in payloads] == [(Kind.PLAN, payload) for payload in payloads]
    sender.join()
    assert near.receive(0.0) is None
    far.close()
    with pytest.raises(PeerGone):
        near.receive(5.0)


def test_what_was_sent_before_hanging_up_is_received() -> None:
    near, far = pair()
    far.send(Kind.RESULT, b"words")
    far.close()
    assert near.receive(5.0) == (Kind.RESULT, b"words")


def test_leader_tells_and_hears_all(ends: tuple[Leader, dict[int, Follower]]) -> None:
    leader, followers = ends
    leader.tell(Kind.PLAN, b"plan")
    for rank, follower in followers.items():
        assert follower.receive() == (Kind.PLAN, b"plan")
        follower.send(Kind.LOADING)
        follower.send(Kind.LOADED, bytes([rank]))
    assert leader.hear(Kind.LOADED) == {1: b"\x01", 2: b"\x02"}


def test_heartbeats_keep_an_idle_follower(ends: tuple[Leader, dict[int, Follower]]) -> None:
    leader, followers = ends
    threading.Timer(3 * TIMEOUT, lambda: leader.tell(Kind.PLAN, b"late")).start()
    assert followers[1].receive() == (Kind.PLAN, b"late")  # and no error for a leader that hangs


def test_a_follower_that_is_gone_is_named(ends: tuple[Leader, dict[int, Follower]]) -> None:
    leader, followers = ends
    followers[2].close()
    for call in (leader.check, lambda: leader.tell(Kind.PLAN), lambda: leader.hear(Kind.LOADED)):
        with pytest.raises(EngineError, match=r"rank 2 \(pid 4002 on there\) is gone"):
            call()


def test_a_follower_that_leaves_while_it_is_heard_is_named(ends: tuple[Leader, dict[int, Follower]]) -> None:
    """Between a look at all of them and the wait for one."""
    leader, followers = ends
    followers[2].close()
    leader.check = lambda: None  # type: ignore[method-assign]
    for call in (lambda: leader.hear(Kind.LOADED), lambda: leader.hear_from(2, Kind.RESULT)):
        with pytest.raises(EngineError, match=r"rank 2 \(pid 4002 on there\) is gone"):
            call()


def test_a_silent_follower_is_named(ends: tuple[Leader, dict[int, Follower]]) -> None:
    leader, followers = ends
    followers[1].send(Kind.LOADED)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"rank 2 \(pid 4002 on there\) has not answered for 0\.6 s"):
        leader.hear(Kind.LOADED)
    assert time.monotonic() - started < 10 * TIMEOUT


def test_the_error_of_a_follower_is_the_leaders(ends: tuple[Leader, dict[int, Follower]]) -> None:
    leader, followers = ends
    followers[1].fail(CheckpointError("model.safetensors is cut off"))
    followers[1].close()
    with pytest.raises(CheckpointError, match=r"rank 1 \(pid 4001 on there\): model\.safetensors is cut off"):
        leader.hear(Kind.LOADED)


def test_a_leader_that_hangs_up_ends_its_followers(ends: tuple[Leader, dict[int, Follower]]) -> None:
    leader, followers = ends
    leader.close()
    with pytest.raises(LeaderGone):
        followers[1].receive()
    with pytest.raises(EngineError, match="rank 0 has ended in the middle of a step"):
        followers[2].check()


def test_a_leader_that_hangs_is_given_up() -> None:
    _near, far = pair()  # nobody sends signs of life
    with pytest.raises(EngineError, match=r"rank 0 has given no sign of life for 0\.6 s"):
        Follower(far, 0, TIMEOUT).receive()


def test_hello_is_what_errors_call_a_rank() -> None:
    hello = Hello(3, "host", 7)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(hello), type=Hello) == hello
    assert str(hello) == "rank 3 (pid 7 on host)"
