"""`glm4 completion`: the shell's own completion script."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion", short_help="completion script for your shell")
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script that completes glm4's commands and options in SHELL.

    \b
    Examples:
      eval "$(glm4 completion bash)"          # in ~/.bashrc
      glm4 completion fish > ~/.config/fish/completions/glm4.fish
    """
    from glm4.cli.main import cli

    completer = get_completion_class(shell)
    assert completer is not None  # click knows these three
    click.echo(completer(cli, {}, "glm4", "_GLM4_COMPLETE").source())
