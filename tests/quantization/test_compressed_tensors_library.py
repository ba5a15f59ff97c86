"""What the library compressed-tensors itself compresses is read as what it decompresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packers import write_folder
from test_formats import open_weights
from torch import Tensor

from glm4.ops.quantized import QuantizedWeight

compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
schemes = pytest.importorskip("compressed_tensors.quantization")


def scales_of(weight: Tensor, arguments: Any) -> dict[str, Tensor]:
    """Scales and zero points by the library, from the extremes of each group."""
    from compressed_tensors.quantization.utils import calculate_qparams

    if arguments.strategy == "block":
        rows, columns = arguments.block_structure
        blocks = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)
        least, greatest = blocks.amin((-2, -1)), blocks.amax((-2, -1))
    elif arguments.strategy == "tensor":
        least, greatest = weight.min().view(1), weight.max().view(1)
    else:
        size = arguments.group_size if arguments.strategy == "group" else weight.shape[1]
        groups = weight.unflatten(1, (-1, size))
        least, greatest = groups.amin(-1), groups.amax(-1)
    scale, zero = calculate_qparams(least, greatest, arguments)
    return {"weight_scale": scale, "weight_zero_point": zero}


@pytest.mark.parametrize(
    ("stored_as", "arguments", "held"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, 4),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, 4),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, 4),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, 8),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}, 8),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, None),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, None),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, None),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}, None),
    ],
)
def test_as_the_library_writes(tmp_path: Path, stored_as: str, arguments: dict[str, Any], held: int | None) -> None:
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=schemes.QuantizationArgs(**arguments))
    compressor = compressors.BaseCompressor.get_value_from_registry(stored_as)
    torch.manual_seed(0)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        weight = torch.randn(shape).bfloat16()
        parts = compressor.compress({"weight": weight} | scales_of(weight, scheme.weights), scheme)
        wide = parts | {"weight_scale": parts["weight_scale"].float()}
        return parts, compressor.decompress(wide, scheme)["weight"].float()

    config = schemes.QuantizationConfig(config_groups={"group_0": scheme}, format=stored_as, ignore=["lm_head"])
    expected = write_folder(tmp_path, config.model_dump(mode="json"), pack)
    weights = open_weights(tmp_path)
    weights.check()
    for name, numbers in expected.items():
        if name.endswith("_proj.weight"):
            read = weights.read(name)
            if held is None:
                assert isinstance(read, Tensor)
                assert torch.equal(read, numbers.bfloat16())
            else:
                assert isinstance(read, QuantizedWeight)
                assert read.bits == held
                torch.testing.assert_close(read.dequantize(torch.float32), numbers, rtol=1e-6, atol=0)
