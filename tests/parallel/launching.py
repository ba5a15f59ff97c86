"""Jobs started through the launcher, as people start them, with small scripts in place of a model."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 60


class Job:
    """A launcher that runs in the current folder, and all processes that come of it."""

    started: ClassVar[list[Job]] = []

    def __init__(
        self, *words: str, module: str = "glm4.cli.msrun", inside: tuple[str, ...] = (), stdin: int = subprocess.PIPE
    ) -> None:
        """words: the launcher's arguments; inside: a command in front, such as one that enters a namespace."""
        self.mark = f"GLM4_TEST_JOB={secrets.token_hex(8)}"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), name: value}
        repository = [str(REPOSITORY)] if module == "glm4.cli.msrun" else []
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-m", module, *repository, *words],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.started.append(self)

    def finish(self, said: str = "") -> Job:
        """Wait for the launcher; `code`, `out` and `err` are what it left."""
        self.out, self.err = self.process.communicate(said, timeout=SECONDS)
        self.code = self.process.returncode
        return self

    @property
    def message(self) -> str:
        """Its last line on standard error, without "error: "."""
        last = self.err.splitlines()[-1]
        assert last.startswith("error: "), self.err
        return last.removeprefix("error: ")

    def left(self) -> list[int]:
        """Processes of the job that still run, zombies included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found


def end_all() -> None:
    """End what failed tests have left running."""
    for job in Job.started:
        for process in job.left():
            os.kill(process, signal.SIGKILL)
        job.process.communicate()
    Job.started.clear()


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def log(rank: int, folder: str = "output/msrun_log") -> str:
    """All that a rank has said."""
    file = Path(folder) / f"worker_{rank}.log"
    return file.read_text("utf-8") if file.exists() else ""
