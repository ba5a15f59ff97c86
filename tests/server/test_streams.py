"""Streams as the server joins them: in order, closed in the end, and not for longer than the deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest

from glm4.server.streams import merged


class Numbers:
    """0, 1, … `count` - 1, and then nothing more, for ever."""

    def __init__(self, count: int, endless: bool = False) -> None:
        self.closed = False
        self._count, self._endless = count, endless

    async def stream(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self._count):
                yield number
            if self._endless:
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def taken(sources: list[Numbers], seconds: float, take: Callable[[tuple[int, int]], None]) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    async for pair in merged([source.stream() for source in sources], deadline):
        take(pair)


@pytest.mark.parametrize("count", [1, 3])
def test_every_item_of_every_stream(count: int) -> None:
    sources, found = [Numbers(4) for _ in range(count)], list[tuple[int, int]]()
    asyncio.run(taken(sources, 60, found.append))
    for index in range(count):
        assert [number for at, number in found if at == index] == [0, 1, 2, 3]
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("count", [1, 3])
def test_the_deadline_closes_all(count: int) -> None:
    sources, found = [Numbers(2, endless=True) for _ in range(count)], list[tuple[int, int]]()
    with pytest.raises(TimeoutError):
        asyncio.run(taken(sources, 0.2, found.append))
    assert len(found) == 2 * count
    assert all(source.closed for source in sources)
