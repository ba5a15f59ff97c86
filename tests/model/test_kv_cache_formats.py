"""Logits over a KV cache in each number format, against transformers with keys and values rounded the same way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from rounded_kv import rounded_reference
from tiny import SHAPES, TinyCheckpoint, write_tiny
from torch import Tensor

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.ops.attention import KVCache, make_batch

CPU = torch.device("cpu")
CHUNKS = [[200], [1] * 200, [16] * 12 + [8], [3, 7, 50, 140]]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny(tmp_path_factory.mktemp("tiny"), **SHAPES[request.param])


def model_of(path: Path, dtype: torch.dtype) -> Glm4ForInference:
    folder = ModelFolder.open(path)
    config = Glm4Config.from_dict(folder.read_json("config.json"))
    return load_model(Checkpoint.open(folder), config, CPU, dtype)


def prompt() -> list[int]:
    draw = random.Random(1)
    return [draw.randrange(4, 320) for _ in range(200)]


@torch.inference_mode()
def paged(model: Glm4ForInference, chunks: list[int], kv_dtype: torch.dtype) -> tuple[Tensor, KVCache]:
    """Logits of every token of the prompt, computed in the given chunks, and the cache; blocks of 1, in order."""
    ids, found, start = prompt(), [], 0
    cache = model.new_kv_cache(len(ids), kv_dtype)
    for size in chunks:
        batch = make_batch([(0, size)], [start], [list(range(len(ids)))], 1, CPU)
        rows = torch.arange(start, start + size)
        found.append(model.logits(model.forward(torch.tensor(ids[start : start + size]), rows, batch, cache)))
        start += size
    return torch.cat(found), cache


@torch.inference_mode()
def test_int8_equals_the_reference_that_rounds_the_same(tiny: TinyCheckpoint) -> None:
    """Logits for any chunks, and every bit of the cache."""
    model = model_of(tiny.path, torch.float64)
    expected = rounded_reference(tiny.path)(torch.tensor([prompt()])).logits[0]
    _, whole = paged(model, [200], torch.int8)
    for chunks in CHUNKS:
        ours, cache = paged(model, chunks, torch.int8)
        assert (ours - expected).abs().max() <= 1e-5
        for pair, same in zip(cache, whole, strict=True):
            for one, other in zip(pair, same, strict=True):
                assert torch.equal(one.data, other.data)
                assert torch.allclose(one.scales, other.scales, rtol=1e-6, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kv_dtype", "share", "most"),
    [(torch.int8, 0.015, 0.1), (torch.bfloat16, 0.005, 0.04), (torch.float32, 1e-5, 1e-5)],
    ids=str,
)
def test_the_stated_bounds_on_what_rounding_moves(
    tiny: TinyCheckpoint, kv_dtype: torch.dtype, share: float, most: float
) -> None:
    """Root mean square as a share of the logits' spread, and the largest move of any logit."""
    exact = tiny.theirs(torch.tensor([prompt()])).logits[0]
    moved = paged(model_of(tiny.path, torch.float32), [120, 80], kv_dtype)[0] - exact
    assert moved.pow(2).mean().sqrt() <= share * exact.std()
    assert moved.abs().max() <= most


def test_float32_under_bfloat16_arithmetic_changes_no_more_than_its_rounding(tiny: TinyCheckpoint) -> None:
    """It holds the same numbers; attention may round its weights to those of a bfloat16 cache."""
    model = model_of(tiny.path, torch.bfloat16)
    (wide, wide_cache), (narrow, cache) = (paged(model, [120, 80], dtype) for dtype in (torch.float32, torch.bfloat16))
    for one, other in zip(wide_cache[0], cache[0], strict=True):
        assert torch.equal(one.data, other.data.float())
    exact = tiny.theirs(torch.tensor([prompt()])).logits[0]
    assert (wide - narrow).abs().max() <= (narrow - exact).abs().max()
