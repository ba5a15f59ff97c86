"""Choosing a device and a number format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from glm4.device import available_devices, free_memory, select_device, select_dtype
from glm4.errors import DeviceError

MISSING = [name for name in ("cuda", "npu") if name not in available_devices()]


def test_auto_takes_the_first_there_is() -> None:
    assert select_device("auto").type == available_devices()[0]
    assert available_devices()[-1] == "cpu"


@pytest.mark.parametrize("name", MISSING)
def test_a_device_that_is_not_here_lists_those_that_are(name: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{name}' is not available here.*; available: .*cpu"):
        select_device(name)


def test_there_is_only_one_cpu() -> None:
    with pytest.raises(DeviceError, match="device_id 3: there is only one CPU"):
        select_device("cpu", 3)


def test_auto_dtype_is_the_stored_one() -> None:
    cpu = torch.device("cpu")
    assert select_dtype("auto", "BF16", cpu) is torch.bfloat16
    assert select_dtype("auto", "F32", cpu) is torch.float32
    assert select_dtype("float32", "BF16", cpu) is torch.float32


def test_free_memory_is_what_the_kernel_says() -> None:
    free = free_memory(torch.device("cpu"))
    total = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0 < free <= total
