"""Ctrl-C while something is in no state for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block.

    A signal mask would not do: the signal would reach another thread, and Python raises in the main one all the same.
    """
    if threading.current_thread() is not threading.main_thread():  # which Ctrl-C never interrupts
        yield
        return
    came = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: came.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came.is_set():
            signal.raise_signal(signal.SIGINT)
