"""The memory plan against counting by hand and against real tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SHAPES, write_tiny

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.errors import MemoryPlanError
from glm4.files import read_json
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.options import KV_CACHE_DTYPES, EngineOptions
from glm4.plan import MemoryPlan, gib, memory_limit


def plan_of(config: Glm4Config, dtype: str = "bfloat16", cards: int = 1, **options: Any) -> MemoryPlan:
    return MemoryPlan.of(config, EngineOptions(**options), dtype, config.max_context, cards)


def official(shared: Path, name: str) -> Glm4Config:
    return Glm4Config.from_dict(read_json(shared / "glm4-0414" / name / "config.json"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sizes_are_those_of_the_tensors(shape: str, dtype: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, **SHAPES[shape])
    folder = ModelFolder.open(tmp_path)
    config = Glm4Config.from_dict(folder.read_json("config.json"))
    model = load_model(Checkpoint.open(folder), config, torch.device("cpu"), getattr(torch, dtype))
    tensors = [model.embed_tokens, model.norm] + ([] if config.tie_word_embeddings else [model.lm_head.weight])
    for layer in model.layers:
        for name in layer.__slots__:
            value = getattr(layer, name)
            tensors += [value] if isinstance(value, torch.Tensor) else [value.weight]
            tensors += [value.bias] if getattr(value, "bias", None) is not None else []
    plan = plan_of(config, dtype)
    assert plan.weights == sum(tensor.nbytes for tensor in tensors)
    for kv_cache_dtype in KV_CACHE_DTYPES:
        plan = plan_of(config, dtype, kv_cache_dtype=kv_cache_dtype)
        cache = model.new_kv_cache(10, getattr(torch, plan.kv_dtype))
        held = [tensor for pair in cache for keys_or_values in pair for tensor in keys_or_values.tensors]
        assert 10 * plan.kv_per_token == sum(tensor.nbytes for tensor in held)


def test_the_official_sizes(shared: Path) -> None:
    """9B: the index says 18,800,558,080 bytes; keys and values are 40 layers · 2 heads · 128 · 2 · 2 bytes."""
    plan = plan_of(official(shared, "GLM-4-9B-0414"))
    assert plan.weights == 18_800_558_080
    assert plan.kv_per_token == 40 * 2 * 128 * 2 * 2
    int8 = plan_of(official(shared, "GLM-4-9B-0414"), kv_cache_dtype="int8")
    assert int8.kv_per_token == 40 * 2 * 2 * (128 + 4)  # a byte for each number, and a float32 scale for each head
    large = official(shared, "GLM-4-32B-0414")
    assert plan_of(large).kv_per_token == 61 * 2 * 128 * 2 * 2
    assert plan_of(large, cards=8).kv_per_token == 61 * 1 * 128 * 2 * 2  # a head is repeated, never cut
    assert plan_of(large, cards=2).weights == pytest.approx(plan_of(large).weights / 2, rel=1e-3)


def test_what_fits_is_used_and_no_more(shared: Path) -> None:
    plan = plan_of(official(shared, "GLM-4-9B-0414"))
    limit = 24 * 2**30
    blocks = plan.kv_blocks(limit)
    held = plan.weights + plan.workspace + blocks * plan.block_size * plan.kv_per_token
    assert limit - plan.block_size * plan.kv_per_token < held <= limit
    useful = plan.context * plan.max_batch_requests // plan.block_size
    assert plan.kv_blocks(2**45) == useful


@pytest.mark.parametrize(
    ("model", "dtype", "limit", "advice"),
    [
        ("GLM-4-9B-0414", "float32", 22, "use --dtype bfloat16"),
        ("GLM-4-9B-0414", "bfloat16", 17.6, "share bfloat16 weights among 2 cards"),
        ("GLM-4-9B-0414", "bfloat16", 17.9, "set max_batch_tokens to 256"),
        ("GLM-4-32B-0414", "bfloat16", 59, "share bfloat16 weights among 2 cards"),
        ("GLM-4-32B-0414", "bfloat16", 16, "share bfloat16 weights among 4 cards"),
        ("GLM-4-32B-0414", "bfloat16", 1, "it needs a larger machine"),
        ("GLM-Z1-Rumination-32B-0414", "bfloat16", 62.17, "set max_model_len to 1024 and max_batch_tokens to 256"),
    ],
)
def test_the_smallest_change_that_fits_is_named(
    shared: Path, model: str, dtype: str, limit: float, advice: str
) -> None:
    with pytest.raises(MemoryPlanError) as caught:
        plan_of(official(shared, model), dtype).kv_blocks(int(limit * 2**30))
    assert advice in str(caught.value)
    assert gib(int(limit * 2**30)) in str(caught.value)


def test_a_limit_of_the_users_own_is_the_first_thing_to_raise(shared: Path) -> None:
    with pytest.raises(MemoryPlanError, match=r"24\.0 GiB are free, so raise max_device_memory"):
        plan_of(official(shared, "GLM-4-9B-0414")).kv_blocks(2**30, free=24 * 2**30)


@pytest.mark.parametrize(
    ("asked", "limit"), [(None, 10_000), (400, 400), (20_000, 10_000), (0.8, 8_000), (1.0, 10_000), (0.00001, 0)]
)
def test_a_limit_is_an_amount_or_a_share_of_what_is_free(asked: int | float | None, limit: int) -> None:
    assert memory_limit(asked, 10_000) == limit
