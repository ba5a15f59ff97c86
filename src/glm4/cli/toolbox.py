"""The tools of a conversation on the terminal: each call is shown, asked about, made, and its result shown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from glm4.agent.functions import FunctionTool, error_result

if TYPE_CHECKING:
    from glm4.text.tool_calls import ToolCall

_SHOWN_LINES, _SHOWN_CHARACTERS = 12, 1000
"""Of a result; the model gets more of it."""

_Reply = Literal["yes", "no", "always"]
_REPLIES: dict[str, _Reply] = {reply[:length]: reply for reply in get_args(_Reply) for length in (1, None)}


class Toolbox:
    """The functions that a model may call, and those of them that need no question any more."""

    def __init__(self, tools: Sequence[FunctionTool], ask: bool) -> None:
        """`ask`: put a question before each call."""
        self._tools = {tool.name: tool for tool in tools}
        self._allowed = set() if ask else set(self._tools)

    @property
    def names(self) -> list[str]:
        """What a model can call."""
        return list(self._tools)

    @property
    def specs(self) -> list[dict[str, Any]]:
        """What a model is told."""
        return [tool.spec for tool in self._tools.values()]

    def lines(self) -> list[str]:
        """One line about each function."""
        return [f"{tool.name}: {tool.signature.description.splitlines()[0]}" for tool in self._tools.values()]

    def run(self, call: ToolCall, longest: int) -> str:
        """The result of a call, of at most `longest` characters and a note; the user may refuse it.

        Everything is shown on standard error. Ctrl-C refuses a call, or stops one that has begun; the model reads that.
        """
        click.secho(f"→ {call.name} {printable(call.arguments)}", fg="cyan", err=True)
        if not self._is_allowed(call.name):
            return error_result("the user refused this call")
        try:
            result = _cut(self._tools[call.name].call(call.arguments), longest)
        except KeyboardInterrupt:
            click.echo(" (stopped)", err=True)
            return error_result("the user stopped this call before it had a result")
        click.secho(f"← {printable(_shortened(result))}", dim=True, err=True)
        return result

    def _is_allowed(self, name: str) -> bool:
        if name in self._allowed:
            return True
        reply = _ask(f"call it? [y]es, [n]o, [a]lways {name}: ")
        if reply == "always":
            self._allowed.add(name)
        return reply != "no"


def _ask(question: str) -> _Reply:
    """What the user replies; Ctrl-C and the end of the input mean no."""
    while True:
        try:
            _forget_typed_ahead()
            click.echo(question, nl=False, err=True)
            line = sys.stdin.readline()  # input() would put the reply among the questions that the up arrow brings back
        except KeyboardInterrupt:
            line = ""
        if not line:
            click.echo("no", err=True)
            return "no"
        reply = _REPLIES.get(line.strip().lower())
        if reply is not None:
            return reply


def _forget_typed_ahead() -> None:
    """Drop what was typed before the question appeared: it is no reply to it."""
    try:
        import termios
    except ImportError:  # Windows
        return
    with contextlib.suppress(termios.error):  # no terminal
        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def printable(text: str) -> str:
    """`text` with what a terminal would obey, or hide, in escapes: what is asked about must be what is called."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[:longest]}\n(cut: these are {longest} of {len(text)} characters)"


def _shortened(text: str) -> str:
    lines = text[:_SHOWN_CHARACTERS].splitlines()
    short = "\n".join(lines[:_SHOWN_LINES])
    return short if len(lines) <= _SHOWN_LINES and len(text) <= _SHOWN_CHARACTERS else f"{short} …"
