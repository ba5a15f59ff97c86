"""The `glm4` command: one file a subcommand, each loaded when it is used."""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

import glm4
from glm4.errors import INTERRUPTED, Glm4Error, OutputError
from glm4.options import nearest

COMMANDS = (
    *("generate", "chat", "serve", "batch", "bench", "plan", "quantize", "verify", "download"),
    *("launch", "doctor", "completion"),
)
_OWN_FLAGS = ("--help", "-h", "--version")


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"glm4.cli.{cmd_name}").command
        return command


@click.command(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`glm4 'question' -m DIR` is short for `glm4 generate`. Any command takes --debug: a traceback "
    "before the one line when something fails.",
)
@click.version_option(glm4.__version__, prog_name="glm4")
def cli() -> None:
    """Run GLM-4-0414 (9B, 32B, GLM-Z1) from a Hugging Face folder.

    \b
    Examples:
      glm4 '请介绍一下北京' -m /path/hf_dir
      cat report.txt | glm4 'Summarise this' -m /path/hf_dir
      glm4 chat -m /path/hf_dir
      glm4 plan /path/hf_dir
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code (see glm4.errors)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = bool(os.environ.get("GLM4_DEBUG")) or "--debug" in args[: _end_of_flags(args)]
    args = [arg for i, arg in enumerate(args) if arg != "--debug" or i >= _end_of_flags(args)]
    _prepare_streams()
    try:
        args = _with_command(args)
        code = cli.main(args, prog_name="glm4", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        command = f"glm4 {args[0]}" if args[0] in COMMANDS else "glm4"
        _fail(f"{error.format_message().removesuffix('.')} (see `{command} --help`)", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)  # below the answer so far
        _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, Glm4Error):
            _fail(str(error), error.exit_code)
        if isinstance(error, OSError) and error.filename is None:  # what is written by name has its own OutputError
            sys.stdout = io.StringIO()  # or Python complains again while it leaves
            _fail(f"standard output cannot be written: {error.strerror}", OutputError.exit_code)
        _fail(f"{type(error).__name__}: {error} (a bug; --debug shows where)", 1)


def _prepare_streams() -> None:
    """Let no stream be the reason for a traceback: closed ones are empty, and odd characters are escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - for good
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `check_utf8` says what is wrong with them
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> None:
    click.echo("error: " + " ".join(line.strip() for line in message.splitlines()), err=True)
    sys.exit(code)


def _end_of_flags(args: list[str]) -> int:
    return args.index("--") if "--" in args else len(args)


def _with_command(args: list[str]) -> list[str]:
    """`args` with `generate` in front where no command is named."""
    if args == ["help"]:
        return ["--help"]
    if not args or args[0] in COMMANDS or args[0] in _OWN_FLAGS:
        return args or ["--help"]
    hint = nearest(args[0], COMMANDS)
    if len(args) == 1 and args[0].isascii() and args[0].isalpha() and "mean" in hint and sys.stdin.isatty():
        raise click.UsageError(f"unknown command {args[0]!r}{hint}")
    return ["generate", *args]
