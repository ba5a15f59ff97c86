"""`glm4 download`: a model from Hugging Face or ModelScope into a folder."""

from __future__ import annotations

import shlex
from pathlib import Path

import click


@click.command("download", short_help="fetch a model from Hugging Face or ModelScope")
@click.argument("repo")
@click.option(
    "--hub",
    type=click.Choice(["huggingface", "modelscope"]),
    default="huggingface",
    show_default=True,
    help="where from",
)
@click.option("--to", "target", type=click.Path(path_type=Path), metavar="DIR", help="folder to fill [default: ./NAME]")
@click.option(
    "--endpoint", metavar="URL", help="address of the hub or of a mirror [default: HF_ENDPOINT, or the hub's]"
)
@click.option("--revision", metavar="REV", help="branch, tag or commit [default: the newest state]")
@click.option(
    "--token",
    metavar="TOKEN",
    help="for models that need one [default: the saved login, HF_TOKEN or MODELSCOPE_API_TOKEN]",
)
def command(
    repo: str, hub: str, target: Path | None, endpoint: str | None, revision: str | None, token: str | None
) -> None:
    """Fetch model REPO, such as zai-org/GLM-4-9B-0414, into a folder.

    Only the files that are needed are fetched; each is checked by size and hash. Run the same command again to go
    on after an interruption, or to check and repair a folder. The folder is printed on stdout, all else on stderr.

    \b
    Examples:
      glm4 download zai-org/GLM-4-9B-0414
      glm4 download zai-org/GLM-4-32B-0414 --to /data/GLM-4-32B-0414
      glm4 download ZhipuAI/GLM-4-9B-0414 --hub modelscope
      glm4 download zai-org/GLM-Z1-9B-0414 --endpoint https://hf-mirror.com
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from glm4.checkpoint.hub import download

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(repo, total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        folder = download(repo, target, hub=hub, endpoint=endpoint, revision=revision, token=token, on_progress=show)
    click.echo(folder)
    click.echo(f'Try it: glm4 generate -m {shlex.quote(str(folder))} "你好"', err=True)
