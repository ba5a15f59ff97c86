"""A folder's checked weights into the MindSpore model, each rank its own part of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore import dtype as mstype
from mindspore.common.np_dtype import bfloat16
from numpy.typing import NDArray

from glm4.checkpoint.safetensors_reader import Checkpoint, RawTensor
from glm4.errors import OptionError
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.modeling_glm4_mindspore import Glm4ForInference, LogitsHead, half_split_order
from glm4.model.utils import shapes_of
from glm4.ops.mindspore import BY_TARGET

if TYPE_CHECKING:  # it comes with torch, which this file does without
    from glm4.model.sharding import Shard

_MOST_IN_BLOCK = 128 * 128
"""block_size × head_dim, as CANN's PagedAttentionOperation limits it."""
_DTYPES = {"bfloat16": mstype.bfloat16, "float32": mstype.float32}


def load_model(
    checkpoint: Checkpoint,
    config: Glm4Config,
    target: str,
    dtype: str,
    num_blocks: int,
    block_size: int,
    shard: Shard,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> tuple[Glm4ForInference, LogitsHead]:
    """The model on `target` ("CPU" or "Ascend") with this rank's `shard` of the weights, and the KV cache's memory.

    dtype: "bfloat16" or "float32", of the weights, the arithmetic and the KV cache. `on_tensor` is called with each
    weight's name, for a progress bar.
    Raises CheckpointError when the folder does not hold exactly this model's weights, and OptionError for blocks that
    the device's attention does not take.
    """
    if target == "Ascend" and (block_size % 16 or block_size * config.head_dim > _MOST_IN_BLOCK):
        most = _MOST_IN_BLOCK // config.head_dim
        raise OptionError(f"block_size {block_size}: attention on Ascend takes multiples of 16, at most {most} here")
    checkpoint.check(shapes_of(config))
    cuts, order = shard.cuts(config, {}), half_split_order(config)
    ranges = [shard.vocabulary(config, rank) for rank in range(shard.tensor_size)]
    widest = max(end - first for first, end in ranges)

    def weight(name: str) -> Tensor:
        array = _as_array(checkpoint.read(name))
        if name in cuts:
            array = _cut(array, cuts[name].axis, cuts[name].ranges)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):  # what is gathered is equally large on every rank
            array = np.concatenate((array, np.zeros((widest - len(array), array.shape[1]), array.dtype)))
        if "q_proj" in name or "k_proj" in name:
            heads = array.reshape(-1, config.head_dim, *array.shape[1:])
            array = heads[:, order].reshape(array.shape)
        tensor = Tensor(np.ascontiguousarray(array, bfloat16 if dtype == "bfloat16" else np.float32))
        checkpoint.release(name)
        on_tensor(name)
        return tensor

    def empty() -> Tensor:
        return ops.zeros((num_blocks, block_size, shard.num_kv_heads(config), config.head_dim), _DTYPES[dtype])

    caches = [(empty(), empty()) for _ in range(config.num_hidden_layers)]
    first_row, ranks = ranges[shard.tensor_rank][0], shard.tensor_size
    model = Glm4ForInference(config, weight, BY_TARGET[target], caches, first_row, ranks)
    tied: Parameter | None = model.embed_tokens.weight if config.tie_word_embeddings else None
    columns = [rank * widest + row for rank, (first, end) in enumerate(ranges) for row in range(end - first)]
    return model, LogitsHead(config, weight, columns, ranks, tied)


def _as_array(raw: RawTensor) -> NDArray[Any]:
    """A view of the file: float32, or bfloat16 for what is stored so."""
    stored, dtype = (np.uint16, bfloat16) if raw.dtype == "BF16" else (np.float32, np.float32)
    return np.frombuffer(raw.buffer, stored).view(dtype).reshape(raw.shape)


def _cut(array: NDArray[Any], axis: int, ranges: tuple[tuple[int, int], ...]) -> NDArray[Any]:
    """Rows or columns of `array`, those of one range after those of the other."""
    parts = [array[first:end] if axis == 0 else array[:, first:end] for first, end in ranges]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
