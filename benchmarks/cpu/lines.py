"""How a side of `compare.py` talks to it. Imports nothing of either side, whose environments differ."""

from __future__ import annotations

import json
import sys
from typing import Any


def answer_lines(name: str, side: Any) -> None:
    """Say who is there, and then answer each line of JSON on standard input: {"do": a method, its arguments}.

    side: has `load_seconds`, and methods that return what JSON can hold.
    """
    _say({"name": name, "load_seconds": side.load_seconds})
    for line in sys.stdin:
        command = json.loads(line)
        _say(getattr(side, command.pop("do"))(**command))


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)
