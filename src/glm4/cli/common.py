"""What several commands share: options derived from the dataclasses, and loading with a progress bar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any

import click

from glm4.errors import OptionError, PromptError
from glm4.interrupts import interrupts_held
from glm4.options import EngineOptions, SamplingParams, ServerOptions, option_kind, options_from

if TYPE_CHECKING:
    from glm4.engine.llm import LLM

Command = Callable[..., Any]

_NOT_SHOWN = ("n", "best_of", "logprobs", "prompt_logprobs")

_METAVARS = {int: "N", float: "X", bool: "True|False", str: "TEXT"}


def model_option(command: Command) -> Command:
    """-m/--model, or the environment variable GLM4_MODEL."""
    return click.option(
        "-m",
        "--model",
        envvar="GLM4_MODEL",
        metavar="DIR",
        help="Hugging Face folder of the model (or set GLM4_MODEL)",
        type=click.Path(),
    )(command)


def engine_options(command: Command) -> Command:
    """One flag for each EngineOptions field but the model."""
    return _flags(EngineOptions, command)


def server_options(command: Command) -> Command:
    """One flag for each ServerOptions field that is no secret; a command line is there for all to read."""
    return _flags(ServerOptions, command)


def _flags(options: type, command: Command) -> Command:
    for option in reversed([f for f in fields(options) if f.name != "model" and not f.metadata.get("secret")]):
        several = str(option.type).startswith("tuple")
        default = "" if option.default in (None, ()) else f" [default: {option.default}]"
        command = click.option(
            "--" + option.name.replace("_", "-"),
            metavar=_metavar(option),
            help=option.metadata["help"] + ("; may be repeated" if several else default),
            multiple=several,
        )(command)
    return command


def _metavar(option: Field[Any]) -> str:
    if "choices" in option.metadata:
        return "|".join(option.metadata["choices"])
    return "SIZE" if "parse" in option.metadata else _METAVARS[option_kind(option)]


def sampling_option(command: Command) -> Command:
    """-o key value, any SamplingParams field that a single shown answer has a use for, as often as needed."""
    names = ", ".join(option.name for option in fields(SamplingParams) if option.name not in _NOT_SHOWN)
    return click.option(
        "-o", "--option", "sampling", nargs=2, multiple=True, metavar="KEY VALUE", help=f"how to answer: {names}"
    )(command)


def sampling_from(pairs: tuple[tuple[str, str], ...], one_text: bool = False) -> SamplingParams:
    """SamplingParams from the values of -o; a repeated `stop` or `stop_token_ids` adds up.

    `one_text`: the command shows one answer's words, so OptionError for options that ask for anything else.
    """
    values: dict[str, Any] = {}
    for key, value in pairs:
        if one_text and key in _NOT_SHOWN:
            raise OptionError(f"-o {key}: this command shows the words of one answer; use glm4 batch, or LLM in Python")
        if key in ("stop", "stop_token_ids"):
            values.setdefault(key, []).append(value)
        else:
            values[key] = value
    params: SamplingParams = options_from(SamplingParams, values, " in -o")
    return params


def check_utf8(text: str, what: str) -> None:
    """Raise PromptError where `text`, which came from the shell, holds bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{what} is not UTF-8 (character {error.start + 1}): convert it first") from error


def load(model: str | None, options: dict[str, Any]) -> LLM:
    """The model in folder `model`, with a progress bar on a terminal; `options` as the shell gave them."""
    if not model:
        raise OptionError("no model: give its folder with -m DIR, or set GLM4_MODEL (demo/glm4-demo is a tiny one)")
    said = {name: value for name, value in options.items() if value is not None}
    engine_options: EngineOptions = options_from(EngineOptions, {"model": model, **said})
    with interrupts_held():
        from glm4.engine.llm import LLM

    with loading_bar() as on_load:
        return LLM(engine_options, on_load=on_load)


@contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, moved by calls with (tensors done, tensors in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("loading"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("load")
        yield lambda done, total: progress.update(task, completed=done, total=total)


def verbose_option(command: Command) -> Command:
    """-v: the program's own log on stderr."""

    def switch(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")

    return click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=switch, help="say what is going on (stderr)"
    )(command)
