"""Work for a caller who may leave, responses that grow, and several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class ClientGone(Exception):
    """The caller has closed the connection: there is nobody to answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when the caller leaves, and ClientGone raised.

    The body of the request has been read already.
    """
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, left):
            each.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come; the generator is closed when the caller leaves, or has got them all."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies must not hold events back
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def merged(streams: Sequence[AsyncGenerator[T, None]], deadline: float) -> AsyncGenerator[tuple[int, T], None]:
    """(index of the stream, item) as items come; every stream is closed in the end.

    Raises what a stream raises, and TimeoutError at `deadline`, by the event loop's clock.
    """
    if len(streams) == 1:  # as nearly always: no task for each item
        async with aclosing(streams[0]) as stream:
            with suppress(StopAsyncIteration):
                while True:
                    async with asyncio.timeout_at(deadline):
                        item = await anext(stream)
                    yield 0, item
        return
    clock = asyncio.get_running_loop().time
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(
                waiting, timeout=max(0.0, deadline - clock()), return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise TimeoutError
            for task in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def primed(stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """`stream`, once its first item is there: what is wrong with a request is known before its answer begins.

    Raises what `stream` raises before that.
    """
    try:
        first = await anext(stream)
    except BaseException:
        await stream.aclose()
        raise

    async def all_of_it() -> AsyncGenerator[T, None]:
        async with aclosing(stream):
            yield first
            async for item in stream:
                yield item

    return all_of_it()
