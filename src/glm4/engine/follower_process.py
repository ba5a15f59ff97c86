"""The process of a rank that its leader starts."""

from __future__ import annotations

import os
import sys
import threading
import time

import msgspec

from glm4.engine.llm import LLM
from glm4.errors import EngineError, Glm4Error
from glm4.options import EngineOptions

_PARENT_SECONDS = 1.0
"""Between two looks at whether the leader is still there."""
_LEADER_FIRST_SECONDS = 1.0
"""For the leader to end this process over an error that it has met, too, or been told: it is said once."""


def _end_with(leader: int) -> None:
    """End this process when its parent has ended, even where it waits for it inside torch."""
    while os.getppid() == leader:
        time.sleep(_PARENT_SECONDS)
    os._exit(EngineError.exit_code)


def main(leader: int) -> None:
    """A rank that process `leader` of this machine started: its options come on standard input."""
    threading.Thread(target=_end_with, args=[leader], name="glm4 leader's end", daemon=True).start()
    options = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=EngineOptions)
    try:
        LLM(options)  # serves, and leaves with SystemExit
    except Glm4Error as error:
        time.sleep(_LEADER_FIRST_SECONDS)
        print(f"ERROR rank {os.environ['RANK']}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
