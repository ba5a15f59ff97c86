"""The only place that names a device."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from glm4.errors import DeviceError

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _npu_found() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    import torch_npu  # registers the "npu" device with torch

    return bool(torch_npu.npu.is_available())


def available_devices() -> list[str]:
    """Devices of this machine, the one that `auto` takes first: "cuda" and "npu" where there are cards, then "cpu"."""
    found = ["cuda"] if torch.cuda.is_available() else []
    return [*found, *(["npu"] if _npu_found() else []), "cpu"]


def select_device(name: str, index: int = 0) -> torch.device:
    """The device called `name` ("auto": the first there is), and the `index`-th card of it.

    Raises DeviceError, listing what is there, when it is not.
    """
    there = available_devices()
    name = there[0] if name == "auto" else name
    if name not in there:
        hint = " (install torch_npu and CANN)" if name == "npu" else ""
        raise DeviceError(f"device {name!r} is not available here{hint}; available: {', '.join(there)}")
    if name == "cpu":
        if index:
            raise DeviceError(f"device_id {index}: there is only one CPU to choose, number 0; leave device_id out")
        return torch.device("cpu")
    count = torch.get_device_module(name).device_count()
    if index >= count:
        raise DeviceError(f"device_id {index}: this machine has {count} {name} card(s), counted from 0")
    return torch.device(name, index)


def select_dtype(name: str, stored: str, device: torch.device) -> torch.dtype:
    """The number format called `name`; "auto": the one the weights are `stored` in ("BF16" or "F32").

    Quantised folders store in "F16" what they do not quantise: that is computed in bfloat16.

    Raises DeviceError for a card that does not compute in bfloat16.
    """
    if name == "auto":
        name = {"BF16": "bfloat16", "F32": "float32", "F16": "bfloat16"}[stored]
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise DeviceError("this card has no bfloat16; use --dtype float32")
    return _DTYPES[name]


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on `device`."""
    if device.type != "cpu":
        free, _ = torch.get_device_module(device.type).mem_get_info(device)
        return int(free)
    return min(_system_memory(), _cgroup_memory())


def _system_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_memory() -> int:
    """What the container's limit leaves (cgroup v2), its page cache counted as free; very large where there is none."""
    group = Path("/sys/fs/cgroup")
    limit_file = group / "memory.max"
    limit = limit_file.read_text(encoding="ascii").strip() if limit_file.exists() else "max"
    if limit == "max":
        return 1 << 62
    used = int((group / "memory.current").read_text(encoding="ascii"))
    stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    return max(0, int(limit) - used + int(stat.get("file", 0)))


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on `device` is done, so that a clock can be read."""
    if device.type != "cpu":
        torch.get_device_module(device.type).synchronize(device)
