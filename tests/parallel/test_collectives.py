"""Sums, largest numbers and rows over real processes, against the same computed here."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from collectives_ranks import Ranks, Setting, part
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from glm4.errors import EngineError
from glm4.parallel.collectives import Alone, make_collectives
from glm4.parallel.world import Degrees, Place

SETTINGS = [Setting(2), Setting(4), Setting(8), Setting(2, near=False), Setting(3, near=False)]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SHAPES = st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple)
SEEDS = st.integers(0, 2**20)
LARGE = (3, 50_001)  # more than a chunk, and no whole number of anything
Start = Callable[[Setting], Ranks]
few = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def name(setting: Setting) -> str:
    return f"{'shared' if setting.near else 'gloo'}-{setting.size}"


@pytest.fixture(scope="module", params=SETTINGS, ids=name)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(request.param, tmp_path_factory.mktemp("group"))
    yield ranks
    ranks.end()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts groups for one test: start(setting) -> Ranks; `tmp_path / "lost"` holds what their check raises."""
    started: list[Ranks] = []

    def start(setting: Setting) -> Ranks:
        started.append(Ranks(setting, tmp_path))
        return started[-1]

    yield start
    for ranks in started:
        ranks.end()


def tensors(answers: list[bytes | None], shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor | None]:
    def tensor(answer: bytes) -> torch.Tensor:
        return (
            torch.frombuffer(bytearray(answer), dtype=dtype).view(shape) if answer else torch.empty(shape, dtype=dtype)
        )

    return [None if answer is None else tensor(answer) for answer in answers]


def same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    """Equal, with NaN equal to NaN."""
    return a is not None and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def test_kind_follows_from_where_the_ranks_run(ranks: Ranks) -> None:
    kind = "SharedMemory" if ranks.setting.near else "Distributed"
    assert ranks.all_do("kind") == [kind] * ranks.setting.size


@few
@given(SHAPES, DTYPES, SEEDS)
@example((2, 4096), torch.bfloat16, 0)
@example(LARGE, torch.float32, 1)
@example(LARGE, torch.bfloat16, 2)
@example((0,), torch.float32, 0)
def test_all_reduce(ranks: Ranks, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    answers = ranks.all_do("call", "all_reduce", shape, dtype, seed)
    assert len(set(answers)) == 1, "the same bits on every rank"
    total = tensors(answers, shape, dtype)[0]
    parts = [part(rank, shape, dtype, seed) for rank in range(ranks.setting.size)]
    if ranks.setting.near:  # in rank order, so that it can be foretold
        expected = parts[0].float()
        for x in parts[1:]:
            expected = expected + x.float()
        assert same(total, expected.to(dtype))
    exact = torch.stack(parts).double().sum(0)
    ordinary = exact.isfinite() & (exact.abs() < 1e38)
    bound = torch.stack(parts).double().abs().sum(0) * 2.0**-24 * ranks.setting.size
    if dtype == torch.bfloat16:
        bound = bound + exact.abs() * 2.0**-8
    assert ((total.double() - exact).abs() <= bound + 1e-44)[ordinary].all()
    assert torch.equal(total.isnan(), exact.isnan())


@few
@given(SHAPES, SEEDS)
@example(LARGE, 1)
def test_all_reduce_max(ranks: Ranks, shape: tuple[int, ...], seed: int) -> None:
    answers = ranks.all_do("call", "all_reduce_max", shape, torch.float32, seed)
    largest = torch.stack([part(rank, shape, torch.float32, seed) for rank in range(ranks.setting.size)]).amax(0)
    for answer in tensors(answers, shape, torch.float32):
        assert same(answer, largest)


@few
@given(st.tuples(st.integers(0, 20), st.integers(0, 60)), DTYPES, SEEDS)
@example(LARGE, torch.float32, 1)
@example((50_001, 3), torch.bfloat16, 1)
def test_gather(ranks: Ranks, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    size = ranks.setting.size
    first, *others = ranks.all_do("call", "gather", shape, dtype, seed)
    assert others == [None] * (size - 1)
    expected = torch.cat([part(rank, shape, dtype, seed) for rank in range(size)], dim=1)
    assert first == bytes(expected.view(torch.uint8).numpy())


def test_nothing_is_left_open_or_mapped(start: Start) -> None:
    ranks = start(Setting(2))
    assert ranks.all_do("holds") == [(True, False)] * 2  # no descriptor, even while the memory is in use
    ranks.all_do("close")
    assert ranks.all_do("holds") == [(False, False)] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_all_use_sockets_when_one_rank_has_no_kernels(start: Start, rank: int) -> None:
    assert start(Setting(2, missing_library=(rank,))).all_do("kind") == ["Distributed"] * 2


def test_different_calls_are_told_and_end_the_group(start: Start) -> None:
    ranks = start(Setting(2))
    ranks.tell(0, "call", "all_reduce", (3,), torch.float32, 0)
    ranks.tell(1, "call", "all_reduce", (4,), torch.float32, 0)
    for rank in (0, 1):
        assert "compute different things" in str(ranks.answer(rank))
    assert all("cut off" in str(answer) for answer in ranks.all_do("call", "all_reduce", (3,), torch.float32, 0))


@pytest.mark.parametrize("near", [True, False], ids=["shared", "gloo"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("shape", [(4096,), (600_000,)], ids=["small", "large"])
def test_rank_lost_on_the_way(start: Start, near: bool, number: signal.Signals, shape: tuple[int, ...]) -> None:
    ranks = start(Setting(3, near, timeout=1.0))
    for rank in range(3):
        ranks.tell(rank, "call_forever", "all_reduce", shape, torch.float32, 0)
    time.sleep(0.3)
    ranks.signal(1, number)
    errors = [ranks.answer(0), ranks.answer(2)]
    assert all(isinstance(error, EngineError) for error in errors)
    lost = f"rank 1 (pid {ranks.processes[1].pid})"
    if near:
        assert [str(error).partition(" for 1 s")[0] for error in errors] == [f"{lost} has not answered"] * 2
    else:  # sockets do not tell which of the others it was
        assert all(lost in str(error) for error in errors)


@pytest.mark.parametrize("near", [True, False], ids=["shared", "gloo"])
def test_check_names_the_lost_rank(start: Start, tmp_path: Path, near: bool) -> None:
    ranks = start(Setting(2, near))
    ranks.tell(0, "call_forever", "all_reduce", (4096,), torch.float32, 0)
    ranks.tell(1, "call_forever", "all_reduce", (4096,), torch.float32, 0)
    ranks.signal(1, signal.SIGKILL)
    (tmp_path / "lost.part").write_text("rank 1 ended with signal 9")
    (tmp_path / "lost.part").rename(tmp_path / "lost")
    assert str(ranks.answer(0)) == "rank 1 ended with signal 9"


def test_rank_that_never_comes() -> None:
    place = Place(rank=2, world_size=4, local_rank=0, local_size=2, degrees=Degrees(tensor=2, data=2))
    with pytest.raises(EngineError, match=r"rank 3 has not answered for 0\.2 s"):
        make_collectives(place, torch.device("cpu"), dist.HashStore(), 0.2)


def test_one_rank_is_alone() -> None:
    alone = make_collectives(Place(), torch.device("cpu"), dist.HashStore(), 1.0)
    x = torch.ones(2, 3)
    assert isinstance(alone, Alone) and alone.size == 1
    assert all(f(x) is x for f in (alone.all_reduce, alone.all_reduce_max, alone.gather))
