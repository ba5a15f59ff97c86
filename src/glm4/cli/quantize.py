"""`glm4 quantize`: a model folder in 4 or 8 bits."""

from __future__ import annotations

import shlex
from pathlib import Path

import click


@click.command("quantize", short_help="write a model folder in 4 or 8 bits")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--quantization",
    type=click.Choice(["int8", "int4"]),
    default="int4",
    show_default=True,
    help="int8: one scale for each output; int4: one for each group of inputs, the output head in int8",
)
@click.option(
    "--group-size",
    type=click.Choice(["128", "64", "32"]),
    default="128",
    show_default=True,
    help="int4: inputs that share a scale; smaller groups are more exact and larger in all",
)
def command(source: str, target: Path, quantization: str, group_size: str) -> None:
    """Write the model folder SOURCE to the new folder TARGET, its weights rounded to 4 or 8 bits.

    TARGET loads like any model folder, in a fraction of the time and the memory, and gives what SOURCE gives with
    the same --quantization. One weight is in memory at a time. TARGET is there when all of it is, and is printed.

    \b
    Examples:
      glm4 quantize /path/hf_dir /path/hf_dir-int4
      glm4 quantize /path/hf_dir /path/hf_dir-int8 --quantization int8
    """
    from math import prod

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from glm4.checkpoint.folder import ModelFolder
    from glm4.model.configuration_glm4 import Glm4Config
    from glm4.model.utils import shapes_of
    from glm4.plan import gib
    from glm4.quantization.packed_writer import write_packed

    folder = ModelFolder.open(source)
    config = Glm4Config.from_dict(folder.read_json("config.json"), str(folder.path / "config.json"))
    shapes = shapes_of(config)
    columns = (
        TextColumn("quantising"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(map(prod, shapes.values())))
        size = write_packed(
            folder,
            target,
            shapes,
            quantization,
            int(group_size),
            on_weight=lambda name: progress.update(task, advance=prod(shapes[name]), description=name),
        )
    click.echo(target)
    click.echo(f'{gib(size)}. Try it: glm4 generate -m {shlex.quote(str(target))} "你好"', err=True)
