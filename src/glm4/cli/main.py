"""The `glm4` command: one file a subcommand, each loaded when it is used."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

import glm4
from glm4.errors import INTERRUPTED, Glm4Error
from glm4.options import nearest

COMMANDS = ("generate", "chat", "plan", "verify", "download", "completion")
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
    "instead of one line when something fails.",
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
    try:
        code = cli.main(_with_command(args), prog_name="glm4", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again while it leaves
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, Glm4Error):
            _fail(str(error), error.exit_code)
        _fail(f"{type(error).__name__}: {error} (a bug; --debug shows where)", 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def _end_of_flags(args: list[str]) -> int:
    return args.index("--") if "--" in args else len(args)


def _with_command(args: list[str]) -> list[str]:
    """`args` with `generate` in front where no command is named."""
    if not args or args[0] in COMMANDS or args[0] in _OWN_FLAGS:
        return args or ["--help"]
    hint = nearest(args[0], COMMANDS)
    if len(args) == 1 and args[0].isascii() and args[0].isalpha() and "mean" in hint and sys.stdin.isatty():
        raise click.UsageError(f"unknown command {args[0]!r}{hint}")
    return ["generate", *args]
