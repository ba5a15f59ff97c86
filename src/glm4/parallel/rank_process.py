"""Becomes one rank: `python rank_process.py LAUNCHER_PID PROGRAM ARGUMENT…`, a program of its own that imports nothing.

A rank dies with its launcher, even when that is killed, and only the first one reads the launcher's standard input.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(launcher: int, command: list[str]) -> None:
    """Replace this process by `command`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before it could be watched
        sys.exit(1)
    if os.environ["RANK"] != "0":
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
