"""Decoder blocks in one call against the functions and layers that they are made of, bit for bit."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyCheckpoint, write_tiny_chat

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.ops.attention import KVCache, make_batch
from glm4.ops.cpu import library
from glm4.ops.cpu.block import NativeBlock, NativeStep
from glm4.ops.fused import run_native_blocks

SPANS, STARTS, TABLES = [(0, 5), (5, 6)], [0, 18], [[3], [0, 1]]
SLOTS, BLOCK = 64, 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_chat(tmp_path_factory.mktemp("blocks"), num_hidden_layers=3)


def load(tiny: TinyCheckpoint, quantization: str, dtype: torch.dtype) -> Glm4ForInference:
    folder = ModelFolder.open(str(tiny.path))
    config = Glm4Config.from_dict(folder.read_json("config.json"))
    return load_model(Checkpoint.open(folder), config, torch.device("cpu"), dtype, lambda name: None, quantization)


def filled(cache: KVCache) -> KVCache:
    """A past of random content, the same every time."""
    random = torch.Generator().manual_seed(5)
    for keys, values in cache:
        for tensor in (*keys.tensors, *values.tensors):
            tensor.copy_(torch.rand(tensor.shape, generator=random) * (50 if tensor.dtype is torch.int8 else 0.1))
    return cache


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_equals_its_parts(
    isas: list[str], tiny: TinyCheckpoint, quantization: str, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    model = load(tiny, quantization, dtype)
    batch = make_batch(SPANS, STARTS, TABLES, BLOCK, torch.device("cpu"))
    ids, positions = torch.tensor([7, 3, 9, 3, 1, 8]), torch.tensor([0, 1, 2, 3, 4, 18])
    blocks = model._blocks
    assert blocks is not None
    for isa in isas:
        library.select_isa(isa)
        found = []
        for parts in (None, blocks):
            model._blocks = parts
            cache = filled(model.new_kv_cache(SLOTS, kv_dtype))
            found.append((model.forward(ids, positions, batch, cache), cache))
        (expected, theirs), (hidden, ours) = found
        assert torch.equal(hidden, expected)
        for their_layer, our_layer in zip(theirs, ours, strict=True):
            for their_cache, our_cache in zip(their_layer, our_layer, strict=True):
                assert all(map(torch.equal, their_cache.tensors, our_cache.tensors))


def test_what_is_not_quantised_goes_the_other_way(isas: list[str], tiny: TinyCheckpoint) -> None:
    assert load(tiny, "none", torch.bfloat16)._blocks is None


def test_what_does_not_fit_is_refused(isas: list[str], tiny: TinyCheckpoint) -> None:
    model = load(tiny, "int8", torch.float32)
    assert model._blocks is not None
    first, config = model.layers[0], model.config
    norms = first.norms(model.norm)
    with pytest.raises(ValueError, match="no decoder block"):
        NativeBlock(first.linears[::-1], norms)  # type: ignore[arg-type]
    batch = make_batch(SPANS, STARTS, TABLES, BLOCK, torch.device("cpu"))
    x, (cos, sin) = torch.ones(6, config.hidden_size), model.rotary(torch.arange(6), torch.float32)
    rest = (batch.slots, batch.native, model._blocks[0], config.head_dim, 1e-5)
    with pytest.raises(ValueError, match="does not go through"):
        NativeStep(x.bfloat16(), x.bfloat16(), cos, sin, *rest)
    with pytest.raises(ValueError, match="does not go through"):
        NativeStep(x, x[:5], cos, sin, *rest)
    with pytest.raises(ValueError, match="outside the cache of 32 slots"):
        run_native_blocks(model._blocks, x, x.clone(), cos, sin, model.new_kv_cache(32, torch.float32), batch, 1e-5)
    step = NativeStep(x, x.clone(), cos, sin, *rest)
    wrong = torch.zeros(SLOTS, 1, config.head_dim)
    with pytest.raises(ValueError, match="does not go with these blocks"):
        step.run(model._blocks[0], wrong, wrong, None, None)
