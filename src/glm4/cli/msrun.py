"""The arguments of MindSpore Transformers' msrun_launcher.sh as those of `glm4 launch`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from glm4.cli.main import main
from glm4.errors import OptionError
from glm4.options import parse_bool

_PROCESSES = "8"
_FORMS = """\
CMD                         8 processes
CMD N                       N processes
CMD N PORT LOG_DIR JOIN TIMEOUT
CMD N LOCAL_N MASTER_ADDR PORT NODE_RANK LOG_DIR JOIN TIMEOUT   once on each machine"""


def launch_arguments(words: Sequence[str], repository: Path) -> list[str]:
    """`glm4 launch`'s arguments for 1, 2, 6 or 9 words; a script that is not here is looked for in `repository`.

    JOIN is True where it is not said, so that the answer and the exit code reach the caller. Raises OptionError.
    """
    match list(words):
        case [command]:
            return ["--nproc", _PROCESSES, "--", *_command(command, repository)]
        case [command, n]:
            return ["--nproc", n, "--", *_command(command, repository)]
        case [command, n, port, log_dir, join, timeout]:
            flags = ["--nproc", n, *_common(port, log_dir, join, timeout)]
        case [command, n, local_n, address, port, node_rank, log_dir, join, timeout]:
            total, local = _number(n, "N"), _number(local_n, "LOCAL_N")
            if local < 1 or total % local:
                raise OptionError(f"N {total} is not a multiple of LOCAL_N {local}, the processes on each machine")
            flags = ["--nproc", local_n, "--nnodes", str(total // local), "--master-addr", address]
            flags += ["--node-rank", node_rank, *_common(port, log_dir, join, timeout)]
        case _:
            raise OptionError(f"{len(words)} arguments; 1, 2, 6 or 9 are understood:\n{_FORMS}")
    return [*flags, "--", *_command(command, repository)]


def _common(port: str, log_dir: str, join: str, timeout: str) -> list[str]:
    stay = [] if parse_bool(join, "JOIN") else ["--no-join"]
    return ["--port", port, "--log-dir", log_dir, "--timeout", timeout, *stay]


def _number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise OptionError(f"{name}: {text!r} is not a whole number") from error


def _command(text: str, repository: Path) -> list[str]:
    """The words of CMD, quotes taken off as a shell does."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise OptionError(f"CMD {text!r}: {error}") from error
    if not words:
        raise OptionError('CMD is empty: give it as one argument, in quotes: "run_mindformer.py …"')
    script = words[0]
    if script.endswith(".py") and not Path(script).is_file() and (repository / script).is_file():
        return [str(repository / script), *words[1:]]
    return words


if __name__ == "__main__":
    try:
        arguments = launch_arguments(sys.argv[2:], Path(sys.argv[1]))
    except OptionError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    main(["launch", *arguments])
