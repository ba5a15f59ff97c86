"""The rows of docs/errors.md, and one case for each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from programs import Bench, Ran


@dataclass(frozen=True)
class Row:
    """One line of a table in docs/errors.md."""

    section: str
    what: str
    message: str
    """Without "error: "; a … stands for anything."""
    code: int

    def matches(self, message: str) -> bool:
        """Whether this is the row's message."""
        return re.fullmatch(".*".join(map(re.escape, self.message.split("…"))), message) is not None


def read_rows(text: str) -> list[Row]:
    """The rows of all tables with the columns: what happened, message in backticks, exit code."""
    rows, section = [], ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif match := re.fullmatch(r"\| (.+?) \| (`+) ?(.+?) ?\2 \| (\d+) \|", line):
            rows.append(Row(section, match[1], match[3], int(match[4])))
    return rows


Case = Callable[[Bench], Ran]
CASES: dict[str, Case] = {}


def case(what: str) -> Callable[[Case], Case]:
    """Registers a function as the case of the row that begins with `what`."""

    def register(function: Case) -> Case:
        assert what not in CASES, f"two cases for {what!r}"
        CASES[what] = function
        return function

    return register
