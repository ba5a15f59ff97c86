"""Lines of a batch, answered by one engine in a thread of its own while more of them come."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

from glm4.api.bodies import Json
from glm4.batch.files import Line
from glm4.batch.run import Batch


class LineWorker:
    """Answers each line that is handed in, from whichever thread. The engine never waits for one answer to end."""

    def __init__(self, batch: Batch) -> None:
        """`batch` takes triaged lines."""
        self._batch, self._arrivals = batch, _Arrivals()
        self._records: dict[int, Future[Json]] = {}
        threading.Thread(target=self._run, name="lines", daemon=True).start()

    def submit(self, line: Line) -> Future[Json]:
        """The record of `line`, when it is there. It raises EngineError when the engine is broken."""
        record = self._records[line.number] = Future()
        self._arrivals.put(line)
        return record

    def _run(self) -> None:
        while True:
            self._arrivals.wait()
            try:
                for number, record in self._batch.run(self._arrivals):
                    self._records.pop(number).set_result(record)
            except Exception as error:  # whoever waits must know
                while self._records:
                    self._records.popitem()[1].set_exception(error)


class _Arrivals(Iterator[Line]):
    """Lines in the order in which they come. Its end means that there is none now, not that there will be none."""

    def __init__(self) -> None:
        self._lines: deque[Line] = deque()
        self._changed = threading.Condition()

    def put(self, line: Line) -> None:
        with self._changed:
            self._lines.append(line)
            self._changed.notify()

    def wait(self) -> None:
        """Return when there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines)

    def __next__(self) -> Line:
        try:
            return self._lines.popleft()
        except IndexError:
            raise StopIteration from None
