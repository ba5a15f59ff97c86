"""Tool calls in what the model writes, told from its prose while the text comes.

GLM-4 writes the function's name on a line of its own and a JSON object after it; several calls in one turn have the
control token `<|assistant|>` between them:

    get_weather⏎{"city": "北京"}<|assistant|>get_weather⏎{"city": "上海"}

Rumination writes one JSON object: `{"name": "search", "arguments": {"query": "…"}}`.

A call begins only at the start of a line, outside a code fence, and only where its name (or form) and the beginning
of its object are right; whatever else the model writes is text. Once begun, arguments are handed on as they were
written, also where they are cut or are no JSON: words that were shown already cannot be taken back.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from glm4.text.detokenizer import held_length

NEXT_CALL = "<|assistant|>"
"""Stands between the messages of one turn; the detokenizer must not skip it."""
_FENCE = "```"
_BLANK = " \t\r\n"

Part = tuple[Literal["text", "call", "arguments"], str]
"""Prose; the name of a call that begins here; more of its arguments."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call; `arguments` is the JSON text that the model wrote."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class _Opening:
    """A call that begins: how much of the text it takes, and what of that are arguments already."""

    name: str
    length: int
    arguments: str = ""


class ToolCallParser(ABC):
    """The parts of one answer; how the text is cut into pieces changes nothing about them, put together.

    White space beside a call is dropped. Prose before and after a call is joined by a newline.
    """

    def __init__(self) -> None:
        self._state: Literal["line start", "line", "arguments"] = "line start"
        self._held = ""
        """Text that is not decided yet."""
        self._object = _ObjectScanner()
        self._fenced = False
        self._space = ""
        """White space after the prose so far, which is dropped if a call follows."""
        self._said = self._resumes = False
        """Some prose was handed on; what comes next is the first after a call."""
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """The parts that `text` settles, in order."""
        self._held += text
        steps = {"line start": self._start_line, "line": self._read_line, "arguments": self._read_arguments}
        while self._held and steps[self._state]():
            pass
        return self._take()

    def finish(self) -> list[Part]:
        """What is still held when the answer ends: it became no call, so it is text, or the arguments' end."""
        held, self._held = self._held, ""
        if self._state == "arguments":
            self._parts.append(("arguments", held))
        else:
            self._say(held)
            self._parts.append(("text", self._space))
        return self._take()

    @abstractmethod
    def _opening(self, text: str) -> _Opening | Literal["undecided"] | None:
        """Whether `text`, at the start of a line, begins with a call."""

    def _take(self) -> list[Part]:
        parts, self._parts = [part for part in self._parts if part[1]], []
        return parts

    def _start_line(self) -> bool:
        text = self._held
        if text.startswith(NEXT_CALL):
            self._held = text.removeprefix(NEXT_CALL)
            self._fenced = False
            self._break()
            return True
        opening = None if self._fenced else self._opening(text)
        marks = text.lstrip(" \t")
        if opening == "undecided" or NEXT_CALL.startswith(text) or _FENCE.startswith(marks):
            return False
        if opening is None:
            self._fenced ^= marks.startswith(_FENCE)
            self._state = "line"
            return True
        self._parts += [("call", opening.name), ("arguments", opening.arguments)]
        self._held = text[opening.length :]
        self._break()
        if not opening.arguments:
            self._object = _ObjectScanner()
            self._state = "arguments"
        return True

    def _read_line(self) -> bool:
        before, separator, _ = self._held.partition(NEXT_CALL)
        line, newline, _rest = before.partition("\n")
        if newline or separator:
            self._say(line + newline)
            self._held = self._held[len(line) + len(newline) :]
            self._state = "line start"
            return True
        kept = len(line) - held_length(line, [NEXT_CALL])
        self._say(line[:kept])
        self._held = line[kept:]
        return False

    def _read_arguments(self) -> bool:
        length = self._object.read(self._held)
        self._parts.append(("arguments", self._held[:length]))
        self._held = self._held[length:]
        if self._object.closed or self._held.startswith(NEXT_CALL):
            self._state = "line start"
            return True
        return False

    def _break(self) -> None:
        """A call, or the model's next message in the same turn, begins."""
        self._space, self._resumes = "", True

    def _say(self, text: str) -> None:
        if self._resumes:
            text = text.lstrip(_BLANK)
            if not text:
                return
            self._resumes = False
            self._space = "\n" if self._said else ""
        text = self._space + text
        prose = text.rstrip(_BLANK)
        self._space = text[len(prose) :]
        if prose:
            self._said = True
            self._parts.append(("text", prose))


class NamedCallParser(ToolCallParser):
    """GLM-4's calls to the functions called `names`; any other name is prose."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    def _opening(self, text: str) -> _Opening | Literal["undecided"] | None:
        line, newline, rest = text.partition("\n")
        if not newline:
            word = line.lstrip(_BLANK)
            possible = word.rstrip(_BLANK) in self._names or any(name.startswith(word) for name in self._names)
            return "undecided" if possible else None
        name = line.strip(_BLANK)
        if name not in self._names:
            return None
        arguments = rest.lstrip(_BLANK)
        first = arguments[1:].lstrip(_BLANK)
        if arguments[:1] not in ("", "{") or first[:1] not in ("", '"', "}"):
            return None
        return _Opening(name, len(text) - len(arguments)) if first else "undecided"


class JsonCallParser(ToolCallParser):
    """Rumination's calls: an object of exactly `name` and `arguments`. They come whole, so that none is mistaken."""

    def __init__(self) -> None:
        super().__init__()
        self._scanner, self._scanned = _ObjectScanner(), 0
        """How far the object at the beginning of the held text has been read, so that nothing is read twice."""

    def _opening(self, text: str) -> _Opening | Literal["undecided"] | None:
        written = text.lstrip(_BLANK)
        if not written.startswith("{"):
            return None if written else "undecided"
        scanner = self._scanner
        self._scanned += scanner.read(written[self._scanned :])
        length = self._scanned
        if not scanner.closed and not written.startswith(NEXT_CALL, length):
            return "undecided"
        self._scanner, self._scanned = _ObjectScanner(), 0
        try:
            call = json.loads(written[:length])
        except (ValueError, RecursionError):
            return None
        if call.keys() != {"name", "arguments"}:
            return None
        name, arguments = call["name"], call["arguments"]
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            return None
        return _Opening(name, len(text) - len(written) + length, json.dumps(arguments, ensure_ascii=False))


class _ObjectScanner:
    """Finds where a JSON object ends, by its brackets outside strings."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.closed = False

    def read(self, text: str) -> int:
        """How many characters of `text`, which continues what was read before, belong to the object.

        Fewer than all are taken where it closes, or where the turn's next message begins (or may begin) outside a
        string: the object is incomplete then.
        """
        for at, character in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character == "<" and (text.startswith(NEXT_CALL, at) or NEXT_CALL.startswith(text[at:])):
                return at
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.closed = True
                    return at + 1
        return len(text)
