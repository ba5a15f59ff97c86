"""A folder's checked weights into the inference model, quantised on the way where that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.model.sharding import WHOLE, Shard
from glm4.model.utils import shapes_of
from glm4.ops.cpu.linear import PackedLinear, make_quantized_linear
from glm4.ops.cpu.memory import Arena
from glm4.ops.cpu.panels import PanelWeight
from glm4.ops.linear import JoinedLinear, Linear, LinearLayer
from glm4.ops.quantized import QuantizedLinear, QuantizedWeight
from glm4.parallel.collectives import ALONE, Collectives
from glm4.quantization.weights import Weights


def load_model(
    checkpoint: Checkpoint,
    config: Glm4Config,
    device: torch.device,
    dtype: torch.dtype,
    on_tensor: Callable[[str], None] = lambda name: None,
    quantization: str = "none",
    shard: Shard = WHOLE,
    collectives: Collectives = ALONE,
) -> Glm4ForInference:
    """The model with the checkpoint's weights, one tensor after the other; of a shared one, this rank's `shard`.

    On a CPU, weights that are stored in `dtype` stay where they are, memory-mapped; all others are copied.
    quantization: none, int8 or int4, see `quantization.layout`. `on_tensor` is called with each weight's name, for a
    progress bar.
    Raises CheckpointError when the folder does not hold exactly this model's weights, and OptionError when they are
    quantised in another way already.
    """
    weights = Weights(checkpoint, shapes_of(config), quantization)
    weights.check()
    cuts = shard.cuts(config, weights.layouts)
    arena = Arena()

    def place(name: str, stored: Tensor) -> Tensor:
        tensor = stored.to(device, dtype)
        if tensor is not stored:
            weights.release(name)
        return tensor

    def weight(name: str) -> Tensor:
        stored = weights.read(name, cuts.get(name))
        assert isinstance(stored, Tensor)  # only the weights of linear layers are ever quantised
        tensor = place(name, stored)
        on_tensor(name)
        return tensor

    def linear(module: str, has_bias: bool) -> LinearLayer:
        name = module + ".weight"
        layer = matrix(name, weight(module + ".bias") if has_bias else None)
        on_tensor(name)
        return layer

    def matrix(name: str, bias: Tensor | None) -> LinearLayer:
        cut = cuts.get(name)
        if cut is not None and len(cut.ranges) > 1 and device.type == "cpu" and weights.is_mapped(name):
            parts = [weights.read(name, each) for each in cut.one_by_one()]  # joined, they would have to be copied
            return JoinedLinear([Linear(place(name, part)) for part in parts if isinstance(part, Tensor)])
        stored = weights.read(name, cut)
        if isinstance(stored, Tensor):
            return Linear(place(name, stored), bias)
        layer = _quantized_linear(stored, bias, device, arena)
        if not (isinstance(stored, PanelWeight) and isinstance(layer, PackedLinear)):  # that one lies where it lay
            weights.release(name)
        return layer

    return Glm4ForInference(config, weight, linear, device, dtype, shard, collectives)


def _quantized_linear(
    weight: QuantizedWeight | PanelWeight, bias: Tensor | None, device: torch.device, arena: Arena
) -> LinearLayer:
    if device.type == "cpu":
        return make_quantized_linear(weight, bias, arena)
    if isinstance(weight, PanelWeight):
        weight = weight.unpack()
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    moved = replace(weight, values=weight.values.to(device), scales=weight.scales.to(device), zeros=zeros)
    return QuantizedLinear(moved, bias)
