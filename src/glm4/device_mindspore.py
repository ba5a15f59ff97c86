"""MindSpore's half of `device`: whether it is installed, where it runs, and in which mode."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass, replace

from glm4.errors import DeviceError, OptionError
from glm4.options import EngineOptions

log = logging.getLogger("glm4")

VERSION = "2.7.1"
"""The version that this program is tested with."""
INSTALL_HINT = (
    f"pip install mindspore=={VERSION} 'numpy<2' on Python 3.11; docs/ascend.md says what an Ascend card needs"
)
_TARGETS = {"cpu": "CPU", "npu": "Ascend"}


def require_mindspore() -> None:
    """Raise DeviceError, with the line that installs it, unless MindSpore is here in the tested version."""
    try:
        found = importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        raise DeviceError(f"backend mindspore: MindSpore is not installed: {INSTALL_HINT}") from None
    if found != VERSION:
        raise DeviceError(f"backend mindspore: MindSpore {found} is installed, and {VERSION} is needed: {INSTALL_HINT}")


def check_options(options: EngineOptions) -> None:
    """Raise OptionError for what this backend does not do, with what to do instead."""
    ways = (
        ("quantization", options.quantization != "none", "leave it out, or use backend torch"),
        ("kv_cache_dtype", options.kv_cache_dtype != "auto", "leave it out, or backend torch"),
        ("pipeline_parallel", options.pipeline_parallel > 1, "use tensor_parallel, or backend torch"),
        ("data_parallel", options.data_parallel > 1, "start it once for each copy, or use backend torch"),
    )
    for name, asked, way in ways:
        if asked:
            raise OptionError(f"{name} {getattr(options, name)} does not go with backend mindspore: {way}")


def adopt_msrun(environment: MutableMapping[str, str] = os.environ) -> None:
    """In a process that msrun started, say which rank it is in the words that torchrun uses: RANK, WORLD_SIZE, ….

    msrun starts the program once more to bring the ranks together: that process does so here, and leaves with
    SystemExit when they have ended. Raises OptionError where msrun leaves it open which rank this is.
    """
    role = environment.get("MS_ROLE")
    if role is None or "RANK" in environment:
        return
    if role == "MS_SCHED":
        require_mindspore()
        import mindspore

        mindspore.set_device("CPU")
        mindspore.communication.init()
        sys.exit(0)
    if "RANK_ID" not in environment:
        raise OptionError("msrun has given this process no rank: start it with --node_rank on each machine")
    environment["RANK"], environment["WORLD_SIZE"] = environment["RANK_ID"], environment["MS_WORKER_NUM"]
    environment["LOCAL_RANK"] = environment["DEVICE_ID"]
    environment.setdefault("LOCAL_WORLD_SIZE", environment["MS_WORKER_NUM"])  # on several machines, say it yourself
    environment["MASTER_ADDR"] = environment["MS_SCHED_HOST"]
    environment["MASTER_PORT"] = str(int(environment["MS_SCHED_PORT"]) + 1)  # MindSpore's own has the other


@dataclass(frozen=True, slots=True)
class MindSporeDevice:
    """The device that MindSpore computes on in this process, which has only one."""

    target: str
    """MindSpore's name of it: "CPU" or "Ascend"."""
    rank: int = 0
    """Among the processes that share every matrix."""
    size: int = 1

    @classmethod
    def open(
        cls, name: str = "auto", index: int = 0, *, graph: bool = True, size: int = 1, threads: int | None = None
    ) -> MindSporeDevice:
        """Choose the device called `name` ("auto", "cpu" or "npu"), its `index`-th card, and graph or PyNative mode.

        threads: of the kernels on a CPU; None: MindSpore's own choice.
        size: processes that share every matrix. Where there are several, msrun has started them and deals out the
        cards, and this waits until all have come.
        Raises DeviceError for a MindSpore or a device that is not there, and OptionError where msrun has started
        another number of processes.
        """
        require_mindspore()
        os.environ.setdefault("GLOG_v", "3")  # else it warns of every kind of device that is not here
        import mindspore

        name = _available(name)
        if name == "cpu" and index:
            raise DeviceError(f"device_id {index}: there is only one CPU to choose, number 0; leave device_id out")
        started = int(os.environ.get("MS_WORKER_NUM", "1"))
        if started != size:
            raise OptionError(
                f"tensor_parallel {size}, but {started} process{'' if started == 1 else 'es'} started: with backend "
                f"mindspore, msrun starts them: msrun --worker_num={size} --local_worker_num={size} --join=True …"
            )
        target = _TARGETS[name]
        try:
            mindspore.set_device(target, index if size == 1 else None)
        except RuntimeError as error:
            raise DeviceError(
                "backend mindspore: this process computes on another device already, and MindSpore has one for each: "
                "start another process"
            ) from error
        mindspore.set_context(mode=mindspore.GRAPH_MODE if graph else mindspore.PYNATIVE_MODE)
        if threads is not None:
            mindspore.set_context(runtime_num_threads=threads)
        if target == "Ascend":
            mindspore.set_context(jit_config={"jit_level": "O0", "infer_boost": "on"})
        elif not graph:
            mindspore.runtime.launch_blocking()  # queueing each small operation takes ten times as long as it
        if size == 1:
            return cls(target)
        from mindspore import communication

        communication.init()
        return cls(target, communication.get_rank(), communication.get_group_size())

    def alone(self) -> MindSporeDevice:
        """The same device for a model that this process holds by itself."""
        return replace(self, rank=0, size=1)

    def dtype(self, asked: str, stored: str) -> str:
        """The number format to compute in: what is `asked` for, "auto" being what the weights are `stored` in.

        On a CPU it is float32 whatever is asked for, and a bfloat16 that is given up is logged.
        """
        wanted = {"BF16": "bfloat16", "F32": "float32"}.get(stored, "bfloat16") if asked == "auto" else asked
        if self.target == "CPU" and wanted != "float32":
            log.info("MindSpore computes in float32 on a CPU: it has no %s there", wanted)
            return "float32"
        return wanted

    def free_memory(self) -> int:
        """Bytes that this process could still take. Raises DeviceError where MindSpore does not say."""
        if self.target == "CPU":
            from glm4.device import free_memory, select_device  # with torch, which the model here does without

            return free_memory(select_device("cpu"))
        import mindspore

        free = int(mindspore.hal.get_device_properties(0, self.target).free_memory)
        if not free:
            raise DeviceError("MindSpore does not say how much memory the card has left: close what else runs on it")
        return free

    def limit_memory(self, limit: int) -> None:
        """Let MindSpore's memory pool on a card grow to `limit` bytes; on a CPU the plan alone limits it.

        Raises OptionError where the pool of this process has its limit already.
        """
        if self.target == "CPU":
            return
        import mindspore

        try:
            mindspore.runtime.set_memory(max_size=f"{limit / 2**30:.2f}GB")
        except RuntimeError as error:
            raise OptionError("max_device_memory: MindSpore takes it once; start another process") from error


def _available(name: str) -> str:
    """`name`, or what "auto" stands for, if there is such a device."""
    import mindspore

    there = [ours for ours, theirs in _TARGETS.items() if mindspore.hal.is_available(theirs)]
    if name == "auto":
        return there[-1]
    if name not in there:
        hint = " (install CANN)" if name == "npu" else ""
        raise DeviceError(f"backend mindspore: no device {name!r} here{hint}; available: {', '.join(there)}")
    return name
