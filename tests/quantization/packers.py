"""Quantised folders, written from the descriptions of their formats, number by number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_json, write_tiny
from torch import Tensor

SHAPE = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Every linear layer has a multiple of 32 inputs and outputs."""


@dataclass
class Integers:
    """w[o, i] = scales[o, g] · (values[o, i] - zeros[o, g]) with g the group of input i."""

    bits: int
    values: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group_of: np.ndarray

    @classmethod
    def random(
        cls, rng: np.random.Generator, shape: tuple[int, int], bits: int, group_size: int, least_zero: int | None
    ) -> Integers:
        """Random ones; `least_zero`: of random zero points, none: all in the middle."""
        outputs, inputs = shape
        groups = inputs // group_size
        scales = rng.uniform(0.01, 0.03, (outputs, groups)) * 16 / 2**bits
        zeros = np.full((outputs, groups), 2 ** (bits - 1))
        if least_zero is not None:
            zeros = rng.integers(least_zero, 2**bits, (outputs, groups))
        values = rng.integers(0, 2**bits, shape)
        return cls(bits, values, zeros, scales.astype(np.float16), np.arange(inputs) // group_size)

    def numbers(self) -> Tensor:
        """The weight, float32 [out, in]."""
        scales, zeros = self.scales.astype(np.float32)[:, self.group_of], self.zeros[:, self.group_of]
        return torch.from_numpy(scales * (self.values - zeros).astype(np.float32))


def words(table: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[n, m] whole numbers → int32 [n, m·bits/32]: those of a row side by side, the first in the lowest bits.

    order: which of a word's numbers is in its lowest bits, which in the next, and so on.
    """
    each = 32 // bits
    rows = []
    for row in table.tolist():
        packed = []
        for start in range(0, len(row), each):
            word = 0
            for place in range(each):
                number = row[start + (order[place] if order else place)]
                assert 0 <= number < 2**bits
                word |= number << (bits * place)
            packed.append(word - 2**32 if word >= 2**31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def gptq(weight: Integers, version: int = 1, minus_one_of_words: bool = False) -> dict[str, Tensor]:
    zeros = weight.zeros
    if version == 1 and not minus_one_of_words:
        zeros = zeros - 1
    qzeros = words(zeros.T, weight.bits)
    if version == 1 and minus_one_of_words:
        ones = sum(1 << (weight.bits * place) for place in range(32 // weight.bits))
        wrapped = [[(word - ones + 2**31) % 2**32 - 2**31 for word in row] for row in qzeros.tolist()]
        qzeros = torch.tensor(wrapped, dtype=torch.int32)
    return {
        "qweight": words(weight.values, weight.bits).t().contiguous(),
        "qzeros": qzeros,
        "scales": torch.from_numpy(weight.scales.T.copy()),
        "g_idx": torch.from_numpy(weight.group_of.astype(np.int32)),
    }


def awq(weight: Integers) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(weight.values.T, 4, order),
        "qzeros": words(weight.zeros.T, 4, order),
        "scales": torch.from_numpy(weight.scales.T.copy()),
    }


def pack_quantized(weight: Integers) -> dict[str, Tensor]:
    """Signed integers plus half their range are the unsigned ones of `weight`."""
    outputs, groups = weight.zeros.shape
    padded = np.zeros((-(-outputs * weight.bits // 32) * 32 // weight.bits, groups), dtype=int)
    padded[:outputs] = weight.zeros
    return {
        "weight_packed": words(weight.values, weight.bits),
        "weight_scale": torch.from_numpy(weight.scales).bfloat16(),
        "weight_shape": torch.tensor(weight.values.shape),
        "weight_zero_point": words(padded.T, weight.bits).t().contiguous(),
    }


def write_folder(
    path: Path, config: dict[str, Any], pack: Callable[[str, tuple[int, int]], tuple[dict[str, Tensor], Tensor]]
) -> dict[str, Tensor]:
    """A tiny folder whose layers' weights are packed; returns all weights of the model as they should be read.

    pack(name, shape): what takes the weight's place, by the ends of the names, and the weight as numbers.
    """
    write_tiny(path, sharded=False, **SHAPE)
    tensors = load_file(path / "model.safetensors")
    expected = {}
    for name, tensor in list(tensors.items()):
        if name.endswith("_proj.weight"):
            parts, expected[name] = pack(name, (tensor.shape[0], tensor.shape[1]))
            del tensors[name]
            tensors |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
        else:
            tensors[name] = expected[name] = tensor.half()  # as these folders usually hold them
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit_json(path / "config.json", quantization_config=config)
    return expected


def read_config(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content
