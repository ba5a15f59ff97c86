"""`glm4 generate`: one answer, streamed to the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from glm4.api.answer import Answer, AnswerForm
from glm4.cli.common import (
    check_utf8,
    engine_options,
    load,
    model_option,
    sampling_from,
    sampling_option,
    verbose_option,
)
from glm4.errors import OptionError, PromptError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from glm4.api.answer import Part
    from glm4.engine.request import RequestOutput


@click.command("generate", short_help="answer one prompt, streamed to the terminal")
@click.argument("prompt", nargs=-1)
@model_option
@click.option("-s", "--system", metavar="TEXT", help="what the model should know or be")
@sampling_option
@click.option("--raw", is_flag=True, help="continue the text as it is, without the chat template")
@click.option("--hide-thoughts", is_flag=True, help="GLM-Z1: show only the answer (thoughts go to stderr otherwise)")
@click.option("--stats", is_flag=True, help="say at the end how many tokens a second it was (stderr)")
@verbose_option
@engine_options
def command(
    prompt: tuple[str, ...],
    model: str | None,
    system: str | None,
    sampling: tuple[tuple[str, str], ...],
    raw: bool,
    hide_thoughts: bool,
    stats: bool,
    **options: Any,
) -> None:
    """Answer PROMPT, or what comes in on stdin, or stdin followed by PROMPT.

    \b
    Examples:
      glm4 generate '请介绍一下北京' -m /path/hf_dir
      cat error.log | glm4 generate 'What went wrong?' -m /path/hf_dir
      glm4 generate 'Write a haiku' -m DIR -o temperature 0.8 -o seed 7 -o max_new_tokens 60
    """
    text = read_prompt(prompt)
    if raw and system:
        raise OptionError("--system needs the chat template: leave out --raw, or write the text into the prompt")
    check_utf8(system or "", "--system")
    params = sampling_from(sampling, one_text=True)
    llm = load(model, options)
    if not raw and not llm.has_chat_template:
        raise OptionError(f"{model} has no chat template, as base models do: pass --raw to continue the text as it is")
    if raw:
        outputs = llm.stream(text, params)
    else:
        messages = [{"role": "system", "content": system}] if system else []
        outputs = llm.stream([*messages, {"role": "user", "content": text}], params)
    last = show(outputs, AnswerForm(llm.thinks and not raw), Answer(), hide_thoughts=hide_thoughts)
    if last.finish_reason == "length":
        count = len(last.token_ids)
        click.echo(f"(stopped after {count} token{'' if count == 1 else 's'}, the limit)", err=True)
    if stats:
        click.echo("; ".join(llm.last_stats.lines()), err=True)


def read_prompt(words: tuple[str, ...]) -> str:
    """Standard input, where it is not a terminal, and the arguments, one below the other.

    Raises PromptError when there is neither, or for bytes that are not UTF-8.
    """
    piped, typed = "", " ".join(words)
    if not sys.stdin.isatty():
        try:
            piped = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").removesuffix("\n")
        except OSError as error:
            raise PromptError(f"standard input cannot be read: {error.strerror}") from error
    check_utf8(piped, "standard input")
    check_utf8(typed, "the prompt")
    text = "\n".join(part for part in (piped, typed) if part)
    if not text.strip():
        raise PromptError("the prompt is empty: give some text as an argument or on standard input")
    return text


def show(
    outputs: Iterable[RequestOutput], form: AnswerForm, answer: Answer, *, hide_thoughts: bool = False
) -> RequestOutput:
    """Write an answer to stdout as it comes, its thoughts dimmed to stderr, and return its last state.

    `answer` grows with it, so that its caller has what there is of an answer that was stopped, and its tool calls.
    """
    parser = form.parser()
    last = None

    def write(parts: Sequence[Part]) -> None:
        for kind, text in parts:
            answer.add((kind, text))
            if kind == "text":
                sys.stdout.write(text)
                sys.stdout.flush()
            elif kind == "thought" and not hide_thoughts:
                click.secho(text, dim=True, nl=False, err=True)

    try:
        for last in outputs:
            write(parser.push(last.delta))
    finally:
        write(parser.finish())
    if answer.text or not answer.calls:
        click.echo()
    elif answer.thought and not hide_thoughts:
        click.echo(err=True)
    assert last is not None  # a request gives at least one output
    return last
