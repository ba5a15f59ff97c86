"""What `serve` and `batch` share: options of one model or several copies of it, here or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from glm4.cluster.placement import Scale
from glm4.errors import OptionError
from glm4.options import EngineOptions

Command = Callable[..., Any]


def ray_options(command: Command) -> Command:
    """--ray, --min-replicas and --max-replicas; the command gets them by these names, for `scale_from`."""
    count = click.IntRange(min=1)
    for decorate in (
        click.option("--max-replicas", type=count, metavar="N", help="with --ray: copies at most, as work comes"),
        click.option("--min-replicas", type=count, metavar="N", help="with --ray: copies at least"),
        click.option("--ray", is_flag=True, help="run the copies on a Ray cluster (see RAY_ADDRESS)"),
    ):
        command = decorate(command)
    return command


def scale_from(options: EngineOptions, ray: bool, min_replicas: int | None, max_replicas: int | None) -> Scale | None:
    """How many copies a Ray cluster is to run; None without --ray. Raises OptionError."""
    if ray:
        return Scale.of(options, min_replicas, max_replicas)
    if min_replicas is not None or max_replicas is not None:
        raise OptionError("--min-replicas and --max-replicas belong to --ray: give --data-parallel, or add --ray")
    return None
