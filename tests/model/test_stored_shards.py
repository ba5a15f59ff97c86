"""Parts of weights that a folder holds in others' formats: the numbers of the whole, and no more memory than theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_threads import opened
from safetensors.torch import load_file, save_file
from test_sharding import part_by_heads
from tiny import edit_json, write_tiny
from torch import Tensor

from glm4.model.sharding import Shard
from glm4.model.utils import shapes_of
from glm4.ops.quantized import QuantizedWeight
from glm4.quantization.weights import Weights

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [48, 32]}


def gptq(weight: Tensor) -> dict[str, Tensor]:
    """Eight inputs of an output in a word, the first in the lowest bits; zero points of 8, stored as 7."""
    outputs, inputs = weight.shape
    values = torch.randint(0, 16, (inputs // 8, 8, outputs), generator=torch.Generator().manual_seed(outputs))
    qweight = sum(values[:, place] << 4 * place for place in range(8))
    return {
        "qweight": (qweight - (qweight >> 31 << 32)).int(),
        "qzeros": torch.full((inputs // 32, outputs // 8), 0x77777777, dtype=torch.int32),
        "scales": (weight.abs().view(outputs, -1, 32).amax(-1) / 8).half().t().contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // 32,
    }


def fp8(weight: Tensor) -> dict[str, Tensor]:
    outputs, inputs = weight.shape
    table = torch.linspace(0.5, 1.5, -(-outputs // 48) * (inputs // 32)).view(-1, inputs // 32)
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": table}


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize(("settings", "pack"), [(GPTQ, gptq), (FP8, fp8)], ids=["gptq", "fp8"])
def test_parts_are_cut_from_the_whole(
    tmp_path: Path, settings: dict[str, Any], pack: Callable[[Tensor], dict[str, Tensor]], degree: int
) -> None:
    write_tiny(tmp_path, sharded=False, num_attention_heads=8, intermediate_size=128)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts = pack(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit_json(tmp_path / "config.json", quantization_config=settings)

    checkpoint, config = opened(tmp_path)
    weights = Weights(checkpoint, shapes_of(config))
    weights.check()
    for name in shapes_of(config):
        whole = weights.read(name)
        numbers = whole.dequantize(torch.float32) if isinstance(whole, QuantizedWeight) else whole
        assert isinstance(numbers, Tensor)
        for rank in range(degree):
            cuts = Shard(rank, degree).cuts(config, weights.layouts)
            part = weights.read(name, cuts.get(name))
            expected = part_by_heads(numbers, name, rank, degree, config)
            if isinstance(part, QuantizedWeight):
                assert torch.equal(part.dequantize(torch.float32), expected)
                held = [each for each in (part.values, part.scales, part.zeros) if each is not None]
            else:
                assert isinstance(part, Tensor)
                assert torch.equal(part, expected)
                held = [] if weights.is_mapped(name) else [part]
            assert all(each.untyped_storage().nbytes() == each.nbytes for each in held)
