"""`glm4 chat`: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glm4.cli.common import (
    check_utf8,
    engine_options,
    load,
    model_option,
    sampling_from,
    sampling_option,
    verbose_option,
)
from glm4.cli.generate import show
from glm4.errors import Glm4Error, OptionError, OutputError
from glm4.options import nearest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from glm4.engine.llm import LLM, Message
    from glm4.engine.request import RequestOutput
    from glm4.options import SamplingParams

_HELP = {
    "/clear": "forget the conversation",
    "/system TEXT": "say what the model should know or be, and start again",
    "/retry": "answer the last question again",
    "/undo": "take the last question and answer back",
    "/save FILE": "write the conversation as JSON",
    "/stats": "tokens a second of the last answer",
    "/help": "this list",
    "/exit": "leave (or Ctrl-D)",
}


@click.command("chat", short_help="talk to a model")
@model_option
@click.option("-s", "--system", metavar="TEXT", help="what the model should know or be")
@sampling_option
@click.option("--hide-thoughts", is_flag=True, help="GLM-Z1: show only the answers")
@verbose_option
@engine_options
def command(
    model: str | None,
    system: str | None,
    sampling: tuple[tuple[str, str], ...],
    hide_thoughts: bool,
    **options: Any,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.

    \b
    Examples:
      glm4 chat -m /path/hf_dir
      glm4 chat -m DIR -s '你是一名导游' -o temperature 0.7
    """
    check_utf8(system or "", "--system")
    params = sampling_from(sampling, one_text=True)
    llm = load(model, options)
    if not llm.has_chat_template:
        raise OptionError(f"{model} has no chat template, as base models do: use `glm4 generate --raw`")
    chat = Chat(llm, params, system, hide_thoughts)
    if sys.stdin.isatty():
        click.echo("Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands; end a line with \\ to go on.")
        _keep_history()
    while (text := _read_turn()) is not None:
        try:
            if not chat.take(text):
                break
        except Glm4Error as error:
            click.echo(f"error: {error}", err=True)
        except KeyboardInterrupt:  # before the answer began
            click.echo(" (stopped)")


class Chat:
    """The conversation so far, and what one line from the user does to it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, hide_thoughts: bool) -> None:
        self.llm, self.params, self.hide_thoughts = llm, params, hide_thoughts
        self.messages: list[Message] = []
        self.start(system)

    def start(self, system: str | None) -> None:
        """Begin again with this system prompt, or none."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def take(self, text: str) -> bool:
        """Answer a line, or obey it if it is a command; False when it says to leave."""
        if not text.strip():
            return True
        check_utf8(text, "that line")
        if text.startswith("/"):
            return self._obey(*text.split(maxsplit=1))
        self.messages.append({"role": "user", "content": text})
        try:
            self._answer()
        except (Glm4Error, KeyboardInterrupt):
            self.messages.pop()
            raise
        return True

    def _answer(self) -> None:
        outputs = _Latest(self.llm.stream(self.messages, self.params))
        try:
            show(outputs, thinks=self.llm.thinks, hide_thoughts=self.hide_thoughts)
        except KeyboardInterrupt:
            outputs.close()
            click.echo(" (stopped)")
        self.messages.append({"role": "assistant", "content": outputs.text})

    def _obey(self, name: str, rest: str = "") -> bool:
        match name:
            case "/exit" | "/quit":
                return False
            case "/help":
                for what, meaning in _HELP.items():
                    click.echo(f"  {what:<14} {meaning}")
            case "/clear":
                self.start(self.system)
            case "/system":
                self.start(rest or None)
            case "/undo" | "/retry":
                self._take_back(again=name == "/retry")
            case "/save":
                self._save(rest)
            case "/stats":
                click.echo("; ".join(self.llm.last_stats.lines()))
            case _:
                known = [what.split()[0] for what in _HELP]
                click.echo(f"unknown command {name!r}{nearest(name, known)} (begin a question with a space)")
        return True

    def _take_back(self, again: bool) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            click.echo("nothing has been said yet")
            return
        self.messages.pop()
        question = self.messages.pop()
        if again:
            self.take(question["content"])

    def _save(self, name: str) -> None:
        if not name:
            click.echo("say where: /save FILE")
            return
        text = json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n"
        try:
            Path(name).expanduser().write_text(text, encoding="utf-8")
        except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user that is not known
            reason = error.strerror if isinstance(error, OSError) else error
            raise OutputError(f"{name}: {reason}; choose another file") from error
        click.echo(f"{len(self.messages)} messages written to {name}")


class _Latest:
    """An answer's outputs, remembering the words so far, so that a stopped answer stays in the conversation."""

    def __init__(self, outputs: Generator[RequestOutput]) -> None:
        self.outputs, self.text = outputs, ""

    def __iter__(self) -> Iterator[RequestOutput]:
        for output in self.outputs:
            self.text = output.text
            yield output

    def close(self) -> None:
        """End the request."""
        self.outputs.close()


def _read_turn() -> str | None:
    """One turn from the user, several lines when they end in a backslash; None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            line = input("" if not sys.stdin.isatty() else "... " if lines else ">>> ")
        except EOFError:
            click.echo()
            return "\n".join(lines) or None
        except KeyboardInterrupt:
            click.echo("\n(Ctrl-D leaves)")
            lines.clear()
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _keep_history() -> None:
    """Line editing, and what was typed in earlier conversations on the up arrow, where this Python has readline."""
    try:
        import readline
    except ImportError:
        return
    import atexit

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    file = state / "glm4" / "history"
    with contextlib.suppress(OSError):  # a history that cannot be kept is no reason not to talk
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if file.exists():
            readline.read_history_file(file)
        readline.set_history_length(1000)

    def write() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(file)

    atexit.register(write)
