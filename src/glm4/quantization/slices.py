"""Some rows or columns of a weight, for a rank that holds no more of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from glm4.ops.quantized import QuantizedWeight
from glm4.quantization.layout import Cut


def part(whole: Tensor, cut: Cut) -> Tensor:
    """What `cut` says of `whole`: a view where it is one range, a copy else."""
    parts = [whole.narrow(cut.axis, first, end - first) for first, end in cut.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, cut.axis)


def quantized_part(whole: QuantizedWeight, cut: Cut) -> QuantizedWeight:
    """The same of a quantised weight, copied; columns are cut between bytes. See `Cut.group_size`."""
    if cut.axis == 0:
        return _map(whole, lambda each: part(each, cut).clone())
    [(first, end)] = cut.ranges
    size = cut.group_size(whole.group_size, whole.in_features)
    groups = torch.arange(first, end, size) // whole.group_size  # of the whole, one for each of the part
    in_a_byte = 8 // whole.bits
    return QuantizedWeight(
        whole.bits,
        size,
        whole.values[:, first // in_a_byte : end // in_a_byte].contiguous(),
        whole.scales[:, groups],
        None if whole.zeros is None else whole.zeros[:, groups],
    )


def _map(weight: QuantizedWeight, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
    zeros = None if weight.zeros is None else change(weight.zeros)
    return replace(weight, values=change(weight.values), scales=change(weight.scales), zeros=zeros)
