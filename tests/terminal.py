"""A program on a real (pseudo-)terminal, and somebody who types."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from programs import REPOSITORY

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A program on a terminal, and somebody who types."""

    def __init__(self, *argv: str) -> None:
        self.screen, terminal = pty.openpty()
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY / "src"),
            "TERM": "dumb",
            "XDG_STATE_HOME": str(Path("state").absolute()),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "glm4", *argv],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C becomes a signal
        )
        os.close(terminal)
        self.text = ""
        """What is on the screen and nobody has waited for yet."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self) -> None:
        """Wait for more on the screen."""
        self.text += self._decoder.decode(os.read(self.screen, 4096))

    def wait_for(self, words: str) -> str:
        """What appeared on the screen up to and with `words`."""
        while words not in self.text:
            ready, _, _ = select.select([self.screen], [], [], 60)
            assert ready, f"no {words!r} in {self.text!r}"
            try:
                self.read()
            except OSError:  # the program has left
                pytest.fail(f"no {words!r} in {self.text!r}")
        before, self.text = self.text.split(words, 1)
        return before + words

    def type(self, keys: str) -> None:
        """Press these keys."""
        os.write(self.screen, keys.encode())

    def press_until(self, key: str, words: str) -> None:
        """Press a key until these words appear: a signal between readline's prompt and its wait for keys is lost."""
        self.type(key)
        while words not in self.text:
            if not select.select([self.screen], [], [], 1)[0]:
                self.type(key)
                continue
            self.read()
        self.wait_for(words)

    def say(self, line: str) -> str:
        """Type a line and wait for the next prompt; what appeared in between."""
        self.type(line + "\n")
        self.wait_for(line)  # the echo
        return self.wait_for(">>> ")

    def close(self) -> None:
        """Turn it off."""
        self.process.kill()
        self.process.wait()
        os.close(self.screen)
