"""Checked tensors of a folder, as torch tensors, into the inference model."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from glm4.checkpoint.safetensors_reader import Checkpoint, RawTensor
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.model.utils import tensor_specs

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def as_tensor(raw: RawTensor) -> Tensor:
    """A view of the file's memory, mapped read-only: writing to it in place ends the process with a segfault."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(raw.buffer, dtype=_TORCH_DTYPES[raw.dtype]).view(raw.shape)


def load_model(
    checkpoint: Checkpoint,
    config: Glm4Config,
    device: torch.device,
    dtype: torch.dtype,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> Glm4ForInference:
    """The model with the checkpoint's weights, one tensor after the other.

    On a CPU, weights that are stored in `dtype` stay where they are, memory-mapped; all others are copied.
    `on_tensor` is called with each name, for a progress bar.
    Raises CheckpointError when the folder does not hold exactly this model's weights.
    """
    checkpoint.check({spec.name: spec.shape for spec in tensor_specs(config)})

    def weight(name: str) -> Tensor:
        stored = as_tensor(checkpoint.read(name))
        tensor = stored.to(device, dtype)
        if tensor is not stored:
            checkpoint.release(name)
        on_tensor(name)
        return tensor

    return Glm4ForInference(config, weight)
