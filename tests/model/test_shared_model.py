"""A model over several ranks, threads here, against transformers and against the same weights on one rank."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_threads import CPU, Group, SharedModel, opened
from tiny import TinyCheckpoint, write_tiny
from torch import Tensor

from glm4.model import loading
from glm4.model.loading import load_model
from glm4.model.modeling_glm4_infer import RowParallel
from glm4.model.utils import shapes_of
from glm4.ops.cpu import library
from glm4.ops.linear import Linear
from glm4.ops.quantized import QuantizedLinear
from glm4.quantization.packed_writer import write_packed

SHAPES: dict[str, dict[str, Any]] = {
    "biases, 2 KV heads": {"attention_bias": True, "num_key_value_heads": 2},
    "no biases, 8 KV heads": {"attention_bias": False, "num_key_value_heads": 8},
    "tied, odd vocabulary": {"num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 323},
    "small vocabulary": {"num_key_value_heads": 1, "vocab_size": 31},
    "yarn": {"num_key_value_heads": 2, "yarn": True},
}
DEGREES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 3), (2, 2), (4, 3)]
GROUPS_OF_128 = {
    "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
"""down_proj has three groups: uneven for two ranks, and cut through for four and eight; so are o_proj's for four."""


def some_ids(count: int, vocabulary: int) -> list[int]:
    draw = random.Random(1)
    return [draw.randrange(4, vocabulary) for _ in range(count)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny(tmp_path_factory.mktemp("tiny"), num_attention_heads=8, **SHAPES[request.param])


@pytest.mark.parametrize(("tensor", "pipeline"), DEGREES)
@torch.inference_mode()
def test_logits_and_greedy_ids_equal_those_of_transformers(tiny: TinyCheckpoint, tensor: int, pipeline: int) -> None:
    shared = SharedModel(tiny.path, tensor, pipeline)
    ids = some_ids(40, tiny.theirs.config.vocab_size)
    theirs = tiny.theirs(torch.tensor([ids])).logits[0]
    for chunks in ([40], [17, 1, 1, 21]):
        assert (shared.logits(ids, chunks) - theirs).abs().max() <= 1e-5
    expected = tiny.theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert shared.greedy(ids, 12) == expected[0, 40:].tolist()


def test_bfloat16_is_no_further_from_the_truth(tiny: TinyCheckpoint) -> None:
    """A sum over ranks is rounded once more than the whole sum: errors stay of one size."""
    ids = some_ids(40, tiny.theirs.config.vocab_size)
    with torch.inference_mode():
        exact = tiny.theirs(torch.tensor([ids])).logits[0]
    errors = [
        (SharedModel(tiny.path, tensor, dtype=torch.bfloat16).logits(ids, [40]) - exact).pow(2).mean().sqrt()
        for tensor in (1, 4)
    ]
    assert errors[1] <= 1.25 * errors[0]


def test_a_model_in_one_piece_exchanges_nothing(tiny: TinyCheckpoint) -> None:
    model = load_model(*opened(tiny.path), CPU, torch.float32)
    for layer in model.layers:
        assert isinstance(layer.o_proj, Linear)
        assert isinstance(layer.down_proj, Linear)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("grouped"), **GROUPS_OF_128).path


@pytest.fixture
def plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The readable reference in place of kernels, which round activations too."""
    monkeypatch.setattr(loading, "make_quantized_linear", lambda weight, bias, arena: QuantizedLinear(weight, bias))


@pytest.mark.usefixtures("plain_layers")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (4, 1), (8, 1), (2, 2)])
def test_quantised_weights_are_those_of_one_rank(grouped: Path, quantization: str, tensor: int, pipeline: int) -> None:
    ids = some_ids(40, 320)
    alone = SharedModel(grouped, 1, quantization=quantization).logits(ids, [40])
    shared = SharedModel(grouped, tensor, pipeline, quantization=quantization).logits(ids, [30, 10])
    assert (shared - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_packed_folder_is_shared_as_what_is_quantised_while_loading(
    grouped: Path, tmp_path: Path, quantization: str
) -> None:
    checkpoint, config = opened(grouped)
    write_packed(checkpoint.folder, tmp_path / "packed", shapes_of(config), quantization, 128)
    ids = some_ids(40, 320)
    for tensor in (2, 4):
        packed = SharedModel(tmp_path / "packed", tensor)
        loaded = SharedModel(grouped, tensor, quantization=quantization)
        assert torch.equal(packed.logits(ids, [40]), loaded.logits(ids, [40]))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_kernels_round_activations_as_those_of_the_whole(grouped: Path, quantization: str, tensor: int) -> None:
    """Each rank sees some of a token's values, and rounds them by the largest of all."""
    if library.load() is None:
        pytest.skip("there are no native kernels here, so activations are not rounded")
    generator = torch.Generator().manual_seed(0)
    alone = SharedModel(grouped, 1, quantization=quantization).models[0][0]
    shared = SharedModel(grouped, tensor, quantization=quantization)
    for name, inputs in (("o_proj", 256), ("down_proj", 384)):
        x = torch.randn(5, inputs, generator=generator) * torch.logspace(-2, 1, inputs)
        weight_shards = [getattr(model.layers[1], name) for model in shared.models[0]]
        assert all(isinstance(layer, RowParallel) for layer in weight_shards)
        whole = getattr(alone.layers[1], name)(x)
        widths = [layer._layer.in_features for layer in weight_shards]
        assert sum(widths) == inputs
        parts = x.split(widths, 1)

        def summed(rank: int, layers: list[Any] = weight_shards, parts: tuple[Tensor, ...] = parts) -> Tensor:
            return layers[rank](parts[rank])

        for result in shared.groups[0].run(summed):
            torch.testing.assert_close(result, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
        on_its_own = sum(layer._layer(part) for layer, part in zip(weight_shards, parts, strict=True))
        assert (on_its_own - whole).abs().max() > 1e-3 * whole.abs().max()  # what each rank's own largest would give


def test_threads_that_fail_do_not_hang() -> None:
    """The double that these tests rest on."""
    group = Group(2)

    def work(rank: int) -> Tensor:
        if rank == 1:
            raise RuntimeError("rank 1 fails")
        return group.members[rank].all_reduce(torch.ones(1))

    with pytest.raises(RuntimeError, match="rank 1 fails"):
        group.run(work)
