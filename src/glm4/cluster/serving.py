"""The model behind a server: one engine, several on this machine, or those of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable

from glm4.cluster.placement import Scale
from glm4.engine.async_llm import AsyncLLM
from glm4.engine.served_model import ServedModel
from glm4.options import EngineOptions


def served_model(
    options: EngineOptions, scale: Scale | None, name: str, on_load: Callable[[int, int], None]
) -> ServedModel:
    """What is to be started for `options`.

    scale: how many replicas a Ray cluster runs, None without one; name: what the application is called there.
    """
    if scale is not None:
        from glm4.cluster.ray_serve import RayReplicas

        return RayReplicas(options, scale, name)
    if options.data_parallel > 1:
        from glm4.cluster.replicas import Replicas

        return Replicas(options, on_load=on_load)
    return AsyncLLM(options, on_load=on_load)
