"""What the MindSpore backend needs and refuses, and that neither side loads the other's library."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from serving import DEMO

from glm4.device_mindspore import VERSION, MindSporeDevice, check_options, require_mindspore
from glm4.errors import DeviceError, OptionError
from glm4.model.configuration_glm4 import RopeParameters
from glm4.ops.rotary import rotary_frequencies, yarn_attention_factor
from glm4.options import EngineOptions


def test_a_missing_mindspore_is_one_line_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(DeviceError, match=rf"not installed: pip install mindspore=={VERSION} 'numpy<2'"):
        require_mindspore()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.3.0")
    with pytest.raises(DeviceError, match=rf"MindSpore 2.3.0 is installed, and {VERSION} is needed: pip install"):
        MindSporeDevice.open("cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [("quantization", "int4"), ("kv_cache_dtype", "int8"), ("pipeline_parallel", 2), ("data_parallel", 2)],
)
def test_what_only_torch_does_is_refused(name: str, value: int | str) -> None:
    check_options(EngineOptions(tensor_parallel=2))
    with pytest.raises(OptionError, match=rf"^{name} {value} does not go with backend mindspore"):
        check_options(EngineOptions(**{name: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "index", "reason"), [("npu", 0, "no device 'npu'"), ("cpu", 1, "device_id 1")])
def test_a_device_that_is_not_there_is_refused(mindspore: None, name: str, index: int, reason: str) -> None:
    with pytest.raises(DeviceError, match=reason):
        MindSporeDevice.open(name, index)


@pytest.mark.parametrize(
    "rope",
    [
        RopeParameters(10000.0, 0.5),
        RopeParameters(10000.0, 0.5, yarn=True, factor=4.0, original_max_position_embeddings=32768),
        RopeParameters(
            500.0, 0.5, yarn=True, factor=8.0, original_max_position_embeddings=64,
            beta_fast=20.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.9, truncate=False,
        ),
        RopeParameters(100.0, 0.5, yarn=True, factor=2.0, original_max_position_embeddings=64, attention_factor=1.5),
    ],
    ids=["plain", "official YaRN", "all of YaRN", "attention factor"],
)  # fmt: skip
def test_angles_are_those_of_torch(mindspore: None, rope: RopeParameters) -> None:
    """To float32's last digit, at which the two libraries' powers differ."""
    from glm4.model.modeling_glm4_mindspore import attention_factor
    from glm4.model.modeling_glm4_mindspore import rotary_frequencies as without_torch

    theirs = rotary_frequencies(
        64,
        rope.theta,
        factor=rope.factor,
        original_max_positions=rope.original_max_position_embeddings if rope.yarn else None,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        truncate=rope.truncate,
    )
    ours = torch.from_numpy(np.asarray(without_torch(64, rope)))
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, rtol=3e-7, atol=0)
    stretch = yarn_attention_factor(rope.factor, rope.mscale, rope.mscale_all_dim)
    assert attention_factor(rope) == (rope.attention_factor or stretch)


def test_the_columns_of_the_table_are_interchangeable(mindspore: None) -> None:
    """No card is at hand: this much of the Ascend column is checked, and that MindSpore has its operations."""
    from glm4.ops.mindspore import ASCEND, CPU

    arguments = {"rms_norm": (1e-5,), "swiglu": (), "rotary": (128,), "paged_attention": (32, 2, 128, 16)}
    for name, values in arguments.items():
        plain, fused = (getattr(column, name)(*values) for column in (CPU, ASCEND))
        assert inspect.signature(plain.construct) == inspect.signature(fused.construct), name


def test_the_model_imports_no_torch(mindspore: None) -> None:
    python("import sys; sys.modules['torch'] = None; import glm4.model.loading_mindspore")


def test_a_torch_answer_imports_no_mindspore() -> None:
    python(
        f"""
import sys
from glm4 import LLM, SamplingParams
LLM({str(DEMO)!r}).generate("北京", SamplingParams(max_new_tokens=1))
assert not [name for name in sys.modules if name.partition(".")[0] == "mindspore"]
"""
    )


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
