"""Ray, where it is installed: the cluster, what a replica takes of it, and its errors as ours."""

from __future__ import annotations

import logging
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from glm4 import errors
from glm4.cluster.placement import num_cards
from glm4.errors import EngineError, Glm4Error, OptionError
from glm4.files import one_line
from glm4.options import EngineOptions

_OURS = re.compile(r"^(?:[\w.]+: )?glm4\.errors\.(\w+): (.+)$", re.MULTILINE)
_CONNECT_SECONDS = 5.0
_REPLICA_GONE = ("ActorDiedError", "ActorUnavailableError", "RayActorError")
_RESOURCE = {"cuda": "GPU", "npu": "NPU"}


def connect() -> ModuleType:
    """Ray, connected to the cluster that RAY_ADDRESS names; without it, to one that is started here and ends with us.

    Raises OptionError where Ray is not installed, and for a cluster that does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
    try:
        import ray
    except ImportError as error:
        raise OptionError("Ray is not installed: pip install 'glm4[ray]'") from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        try:
            host, _, port = address.rpartition(":")
            if port.isdecimal() and "//" not in host:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise OptionError(
                f"the Ray cluster at {address} does not answer: {reason}; set RAY_ADDRESS to one that does"
            ) from error
    module: ModuleType = ray
    return module


def placed(ray: ModuleType, options: EngineOptions) -> tuple[EngineOptions, dict[str, Any]]:
    """The options of one replica, and the arguments with which Ray gives it a place, as for any actor.

    A replica is on one machine: a card, or as many as share the model. On CPUs it gets `threads` of them for each
    process, or all of a machine, and the memory of a machine is divided among as many as fit on it.
    Raises OptionError where no machine has that much.
    """
    machines: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cards, one = num_cards(options), replace(options, data_parallel=1, model=str(Path(options.model).resolve()))
    there = [device for device, name in _RESOURCE.items() if any(machine.get(name) for machine in machines)]
    device = options.device if options.device != "auto" else (*there, "cpu")[0]
    name = _RESOURCE.get(device, "CPU")
    most = int(max(machine.get(name, 0) for machine in machines))
    needed = cards if device != "cpu" else cards * (options.threads or max(1, most // cards))
    if needed > most:
        raise OptionError(
            f"a replica takes {needed} {name}s of one machine, and no machine of the Ray cluster has more than {most}: "
            "lower --tensor-parallel, --pipeline-parallel or --threads"
        )
    if device == "cuda":
        return replace(one, device=device), {"num_cpus": 1, "num_gpus": cards}
    if device == "npu":
        return replace(one, device=device), {"num_cpus": 1, "resources": {name: cards}}
    allowed, fit = 1.0 if options.max_device_memory is None else options.max_device_memory, most // needed
    share = allowed // fit if isinstance(allowed, int) else allowed / fit
    return replace(one, device=device, threads=needed // cards, max_device_memory=share), {"num_cpus": needed}


def as_ours(error: BaseException) -> Glm4Error:
    """The Glm4Error that a Ray error carries, which may be only in its text; else an EngineError."""
    for each in (error, getattr(error, "cause", None), error.__cause__):
        if isinstance(each, Glm4Error) and type(each).__module__ == errors.__name__:  # not Ray's mixture of two errors
            return type(each)(str(each))
    found = _OURS.findall(str(error))
    kind: type[Glm4Error] | None = getattr(errors, found[-1][0], None) if found else None
    if kind is not None:
        return kind(found[-1][1])
    if type(error).__name__ in _REPLICA_GONE:
        return EngineError("the replica that had the request has died, and another one takes its place: repeat it")
    return EngineError(f"Ray: {type(error).__name__}: {one_line(error)}")
