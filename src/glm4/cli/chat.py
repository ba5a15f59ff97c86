"""`glm4 chat`: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glm4.agent.functions import load_tools
from glm4.cli.common import (
    check_utf8,
    engine_options,
    load,
    model_option,
    sampling_from,
    sampling_option,
    verbose_option,
)
from glm4.cli.conversation import Conversation
from glm4.cli.toolbox import Toolbox
from glm4.errors import Glm4Error, OptionError, PromptError

if TYPE_CHECKING:
    from glm4.engine.llm import LLM

_MAX_ROUNDS = 16


@click.command("chat", short_help="talk to a model")
@model_option
@click.option("-s", "--system", metavar="TEXT", help="what the model should know or be")
@sampling_option
@click.option("--tools", metavar="FILE.py", help="Python functions that the model may call (docs/agents.md)")
@click.option("--yes", is_flag=True, help="make the model's calls without a question before each")
@click.option(
    "--max-rounds",
    type=click.IntRange(1),
    metavar="N",
    help=f"rounds of calls for one question at most [default: {_MAX_ROUNDS}]",
)
@click.option("--hide-thoughts", is_flag=True, help="GLM-Z1: show only the answers")
@verbose_option
@engine_options
def command(
    model: str | None,
    system: str | None,
    sampling: tuple[tuple[str, str], ...],
    tools: str | None,
    yes: bool,
    max_rounds: int | None,
    hide_thoughts: bool,
    **options: Any,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.

    \b
    Examples:
      glm4 chat -m /path/hf_dir
      glm4 chat -m DIR -s '你是一名导游' -o temperature 0.7
      glm4 chat -m DIR --tools examples/agent/tools.py
    """
    check_utf8(system or "", "--system")
    params = sampling_from(sampling, one_text=True)
    toolbox = _open_toolbox(tools, yes, max_rounds)
    llm = load(model, options)
    if not llm.has_chat_template:
        raise OptionError(f"{model} has no chat template, as base models do: use `glm4 generate --raw`")
    if toolbox:
        _check_takes_tools(llm, toolbox)
    chat = Conversation(
        llm, params, system, hide_thoughts=hide_thoughts, toolbox=toolbox, max_rounds=max_rounds or _MAX_ROUNDS
    )
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


def _open_toolbox(file: str | None, yes: bool, max_rounds: int | None) -> Toolbox | None:
    """The tools in `file`, if there is one. Raises OptionError for flags that do not go together."""
    if file is None:
        if yes or max_rounds:
            flag = "--yes" if yes else "--max-rounds"
            raise OptionError(f"{flag} is about tools, and there are none: add --tools FILE.py")
        return None
    if not yes and not sys.stdin.isatty():  # the replies would be taken from among the questions
        raise OptionError("--tools asks before each call, and standard input is no terminal: add --yes, or type")
    return Toolbox(load_tools(file), ask=not yes)


def _check_takes_tools(llm: LLM, toolbox: Toolbox) -> None:
    """Raise OptionError where the model's chat template has no place for tools."""
    try:
        llm.encode_chat([{"role": "user", "content": "?"}], toolbox.specs)
    except PromptError as error:
        raise OptionError(f"--{error}") from error


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
