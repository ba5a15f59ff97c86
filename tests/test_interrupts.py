"""Ctrl-C is held, whichever thread the signal reaches, and is not lost."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from glm4.interrupts import interrupts_held


def test_it_comes_after_the_block() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = False
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done = True
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_waits_beside_other_threads_too() -> None:
    """A process's signal goes to any thread that does not block it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    over = threading.Event()
    others = [threading.Thread(target=over.wait) for _ in range(4)]
    for thread in others:
        thread.start()
    done = 0
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGINT)
            done += 1
    over.set()
    assert done == 20


def test_without_an_interrupt_nothing_happens_in_any_thread() -> None:
    results: list[int] = []

    def work() -> None:
        with interrupts_held():
            results.append(1)

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [1, 1]
