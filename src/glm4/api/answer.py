"""The parts of a chat answer, told apart while its words come: thought, prose, tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from glm4.text.reasoning import ThoughtSplitter
from glm4.text.tool_calls import JsonCallParser, NamedCallParser, ToolCall, ToolCallParser

Part = tuple[Literal["thought", "text", "call", "arguments"], str]
"""More of the thought; more prose; the name of a call that begins here; more of its arguments."""


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What answers to one request may consist of."""

    inside_thought: bool = False
    """The prompt ends in `<think>`."""
    tool_names: Sequence[str] = ()
    json_calls: bool = False
    """Calls are Rumination's JSON, whatever their names."""

    def parser(self) -> AnswerParser:
        """A parser for one answer."""
        calls: ToolCallParser | None = NamedCallParser(self.tool_names) if self.tool_names else None
        return AnswerParser(self.inside_thought, JsonCallParser() if self.json_calls else calls)


class AnswerParser:
    """Reads one answer; where it is cut into pieces makes no difference to its parts, put together."""

    def __init__(self, inside_thought: bool, calls: ToolCallParser | None) -> None:
        self._thoughts, self._calls = ThoughtSplitter(inside_thought), calls

    def push(self, text: str) -> list[Part]:
        """The parts that `text` settles, in order."""
        return [part for kind, words in self._thoughts.push(text) for part in self._told_apart(kind, words)]

    def finish(self) -> list[Part]:
        """What is still held when the answer ends."""
        parts = [part for kind, words in self._thoughts.finish() for part in self._told_apart(kind, words)]
        return parts + list[Part](self._calls.finish() if self._calls else [])

    def _told_apart(self, kind: str, words: str) -> list[Part]:
        if kind == "thought":
            return [("thought", words)]
        return list[Part](self._calls.push(words)) if self._calls else [("text", words)]


@dataclass(slots=True)
class Answer:
    """A whole answer, or what there is of it."""

    thought: str = ""
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """Append one part."""
        kind, words = part
        match kind:
            case "thought":
                self.thought += words
            case "text":
                self.text += words
            case "call":
                self.calls.append(ToolCall(words, ""))
            case "arguments":
                self.calls[-1] = ToolCall(self.calls[-1].name, self.calls[-1].arguments + words)


def read_answer(text: str, form: AnswerForm) -> Answer:
    """The parts of a whole answer."""
    parser, answer = form.parser(), Answer()
    for part in parser.push(text) + parser.finish():
        answer.add(part)
    return answer
