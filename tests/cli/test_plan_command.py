"""`glm4 plan` against numbers worked out by hand from the official configs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from programs import Bench

from glm4.mindformers.config import read_job


@pytest.fixture
def wide(bench: Bench) -> Bench:
    bench.monkeypatch.setenv("COLUMNS", "200")
    return bench


def parameters(vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, biases: bool) -> int:
    """Embedding and head; in each layer q, k, v, o, gate, up and down, four norms, and biases; a last norm."""
    attention = 2 * hidden * heads * 128 + 2 * hidden * kv_heads * 128
    if biases:
        attention += (heads + 2 * kv_heads) * 128
    return 2 * vocab * hidden + layers * (attention + 3 * hidden * inner + 4 * hidden) + hidden


@pytest.mark.parametrize(
    ("name", "total", "billions", "weights", "kv"),
    [
        # KV of a token: keys and values × layers × 2 heads × 128 numbers × 2 bytes; 1,024 of them make a MiB each KiB
        ("GLM-4-9B-0414", parameters(151552, 4096, 40, 32, 2, 13696, True), "9.40 billion", "17.5 GiB", "40.0 MiB"),
        ("GLM-4-32B-0414", parameters(151552, 6144, 61, 48, 2, 23040, False), "32.57 billion", "60.7 GiB", "61.0 MiB"),
    ],
)
def test_official_models(
    wide: Bench, shared: Path, name: str, total: int, billions: str, weights: str, kv: str
) -> None:
    ran = wide.glm4("plan", str(shared / "glm4-0414" / name), "--memory", "80GB")
    assert ran.code == 0
    assert f"{total / 1e9:.2f} billion" == billions
    assert f"{2 * total / 2**30:.1f} GiB" == weights
    assert f"{billions}, " in ran.out
    assert f"{weights} in bfloat16, " in ran.out
    assert f"{kv} per 1,024 tokens" in ran.out


def test_yaml_is_one_that_the_other_program_takes(wide: Bench) -> None:
    odd = wide.folder / "it's [bold] #1 模型" / ("long " * 30).strip()
    odd.parent.mkdir()
    shutil.copytree(wide.model, odd)
    ran = wide.glm4("plan", str(odd), "--memory", "200MB", "--context", "300", "--dtype", "float32")
    assert ran.code == 0
    Path("plan.yaml").write_text(ran.out[ran.out.index("# the keys") :], "utf-8")
    job = read_job(["--config", "plan.yaml", "--predict_data", "hi"])
    assert job.engine.model == str(odd)
    assert job.engine.max_device_memory == 200 * 2**20
    assert job.engine.max_model_len == 300
    assert job.engine.dtype == "float32"


def test_yaml_of_several_cards(wide: Bench, shared: Path) -> None:
    ran = wide.glm4("plan", str(shared / "glm4-0414" / "GLM-4-32B-0414"), "--memory", "59GB")
    assert "fits on 2 cards with 59.0 GiB each" in ran.out
    yaml = ran.out[ran.out.index("# the keys") :]
    for line in ("use_parallel: true", "  model_parallel: 2", "  max_device_memory: 59GB"):
        assert f"\n{line}\n" in yaml


def test_free_memory_is_the_limit_where_none_is_given(wide: Bench) -> None:
    wide.monkeypatch.setattr("glm4.device.free_memory", lambda device: 3 * 2**30)
    ran = wide.glm4("plan", str(wide.model))
    assert "fits on one card with 3.0 GiB each" in ran.out
    assert "max_device_memory: 3GB\n" in ran.out


def test_a_share_of_the_free_memory(wide: Bench) -> None:
    wide.monkeypatch.setattr("glm4.device.free_memory", lambda device: 4 * 2**30)
    assert "fits on one card with 3.0 GiB each" in wide.glm4("plan", str(wide.model), "--memory", "75%").out
    assert "--memory: '0%' is not a share of the free memory" in wide.glm4("plan", "model", "--memory", "0%").err


def test_an_int8_kv_cache(wide: Bench, shared: Path) -> None:
    """40 layers, keys and values, 2 heads, 128 bytes and a scale of 4: 21,120 bytes a token."""
    ran = wide.glm4("plan", str(shared / "glm4-0414" / "GLM-4-9B-0414"), "--memory", "24GB", "--kv-cache-dtype", "int8")
    assert "20.6 MiB per 1,024 tokens" in ran.out
    assert "tokens that the KV cache holds, bfloat16, KV int8 " in ran.out
    Path("plan.yaml").write_text(ran.out[ran.out.index("# the keys") :], "utf-8")
    assert read_job(["--config", "plan.yaml", "--predict_data", "hi"]).engine.kv_cache_dtype == "int8"


def test_a_folder_without_weights_is_enough(wide: Bench) -> None:
    for file in wide.model.glob("*.safetensors*"):
        file.unlink()
    assert wide.glm4("plan", "model").code == 0
