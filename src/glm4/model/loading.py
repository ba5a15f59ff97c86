"""A folder's checked weights into the inference model, quantised on the way where that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.model.utils import shapes_of
from glm4.ops.cpu.linear import make_quantized_linear
from glm4.ops.cpu.memory import Arena
from glm4.ops.linear import Linear, LinearLayer
from glm4.ops.quantized import QuantizedLinear, QuantizedWeight
from glm4.quantization.weights import Weights


def load_model(
    checkpoint: Checkpoint,
    config: Glm4Config,
    device: torch.device,
    dtype: torch.dtype,
    on_tensor: Callable[[str], None] = lambda name: None,
    quantization: str = "none",
) -> Glm4ForInference:
    """The model with the checkpoint's weights, one tensor after the other.

    On a CPU, weights that are stored in `dtype` stay where they are, memory-mapped; all others are copied.
    quantization: none, int8 or int4, see `quantization.layout`. `on_tensor` is called with each weight's name, for a
    progress bar.
    Raises CheckpointError when the folder does not hold exactly this model's weights, and OptionError when they are
    quantised in another way already.
    """
    weights = Weights(checkpoint, shapes_of(config), quantization)
    weights.check()
    arena = Arena()

    def place(name: str, stored: Tensor) -> Tensor:
        tensor = stored.to(device, dtype)
        if tensor is not stored:
            weights.release(name)
        on_tensor(name)
        return tensor

    def weight(name: str) -> Tensor:
        stored = weights.read(name)
        assert isinstance(stored, Tensor)  # only the weights of linear layers are ever quantised
        return place(name, stored)

    def linear(module: str, has_bias: bool) -> LinearLayer:
        name = module + ".weight"
        bias = weight(module + ".bias") if has_bias else None
        stored = weights.read(name)
        if isinstance(stored, Tensor):
            return Linear(place(name, stored), bias)
        layer = _quantized_linear(stored, bias, device, arena)
        weights.release(name)
        on_tensor(name)
        return layer

    return Glm4ForInference(config, weight, linear)


def _quantized_linear(weight: QuantizedWeight, bias: Tensor | None, device: torch.device, arena: Arena) -> LinearLayer:
    if device.type == "cpu":
        return make_quantized_linear(weight, bias, arena)
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    moved = replace(weight, values=weight.values.to(device), scales=weight.scales.to(device), zeros=zeros)
    return QuantizedLinear(moved, bias)
