"""`glm4 serve`: an HTTP server with the APIs of OpenAI and Anthropic."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click
import yaml

from glm4.cli.common import engine_options, loading_bar, model_option, server_options
from glm4.cli.replica_options import ray_options, scale_from
from glm4.cluster.placement import Scale
from glm4.errors import OptionError
from glm4.options import EngineOptions, ServerOptions, nearest, options_from

_OPTIONS: dict[str, Field[Any]] = {f.name: f for cls in (EngineOptions, ServerOptions) for f in fields(cls)}

_SERVED = {"step_stretch": "1.8"}
"""What is different when many are served: a long prompt must not stop everyone's answers."""


@click.command("serve", short_help="serve the APIs of OpenAI and Anthropic")
@model_option
@click.option("--config", metavar="FILE.yaml", help="options by name, one a line (port: 8000)")
@ray_options
@server_options
@engine_options
def command(
    model: str | None, config: str | None, ray: bool, min_replicas: int | None, max_replicas: int | None, **flags: Any
) -> None:
    """Serve the model over HTTP, to the clients of OpenAI's and Anthropic's APIs; see docs/server.md.

    Every option can be given as a flag, as an environment variable (GLM4_PORT=8000) or in FILE.yaml; where it is given
    twice, the flag counts more than the environment, and that more than the file. API keys come from GLM4_API_KEY, from
    a file of them, or from FILE.yaml, never from a flag, which others can see.

    The first SIGTERM or Ctrl-C lets running requests end, the second ends them.

    \b
    Examples:
      glm4 serve -m /path/hf_dir
      GLM4_API_KEY=secret glm4 serve -m /path/hf_dir --host 0.0.0.0
      glm4 serve -m demo/glm4-demo --max-queue 16 --max-answer-tokens 2000
      glm4 serve -m /path/hf_dir --data-parallel 4
      RAY_ADDRESS=10.0.0.1:6379 glm4 serve -m /path/hf_dir --ray --min-replicas 1 --max-replicas 8
    """
    said = {name: value for name, value in {"model": model, **flags}.items() if value not in (None, ())}
    values = {**_SERVED, **(_read_config(config) if config else {}), **_from_environment(os.environ), **said}
    server = options_from(ServerOptions, _of(ServerOptions, values))
    engine = options_from(EngineOptions, _of(EngineOptions, values))
    if not engine.model:
        raise OptionError("no model: give its folder with -m DIR, or set GLM4_MODEL (demo/glm4-demo is a tiny one)")
    scale = scale_from(engine, ray, min_replicas, max_replicas)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    from glm4.server.run import take_address

    with take_address(server) as listener:
        asyncio.run(_serve(engine, scale, server, listener))


async def _serve(engine: EngineOptions, scale: Scale | None, server: ServerOptions, listener: socket.socket) -> None:
    from glm4.cluster.serving import served_model
    from glm4.server.run import serve

    with loading_bar() as on_load:
        name = f"glm4-{socket.gethostname()}-{listener.getsockname()[1]}"
        llm = await served_model(engine, scale, name, on_load).start()
    try:
        await serve(llm, server, listener)
    finally:
        await llm.shutdown()


def _of(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {option.name for option in fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Options from GLM4_ variables; one that holds several values has commas between them."""
    found: dict[str, Any] = {}
    for name, option in _OPTIONS.items():
        text = environment.get(f"GLM4_{name.upper()}", "")
        if text:
            found[name] = text.split(",") if str(option.type).startswith("tuple[str") else text
    return found


def _read_config(file: str) -> dict[str, Any]:
    """Options by name from a YAML file; values stay the texts that stand in it. Raises OptionError."""
    try:
        root = yaml.compose(Path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise OptionError(f"{file} cannot be read: {error.strerror}; give --config another file") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise OptionError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise OptionError(f"{file} holds no options: write one a line, such as port: 8000")
    values: dict[str, Any] = {}
    for key, node in root.value:
        where = f"{file}:{key.start_mark.line + 1}"
        if not isinstance(key.value, str) or key.value not in _OPTIONS:
            raise OptionError(f"{where}: unknown option {key.value!r}{nearest(str(key.value), _OPTIONS)}")
        if key.value in values:
            raise OptionError(f"{where}: {key.value} stands twice: keep one of the two")
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise OptionError(f"{where}: {key.value} takes a value, or a list of them")
        texts = [item.value for item in items]
        values[key.value] = texts if isinstance(node, yaml.SequenceNode) else texts[0]
    return values
