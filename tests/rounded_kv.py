"""transformers' model with keys and values rounded before anything sees them: the reference for a rounded KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor


def round_int8(x: Tensor) -> Tensor:
    """Each head of each token to the nearest of 255 steps of max |x| / 127, computed in NumPy's float32."""
    wide = x.detach().float().numpy()
    scale = np.abs(wide).max(-1, keepdims=True) / np.float32(127)
    return torch.from_numpy(np.rint(wide / scale) * scale).to(x.dtype)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
    """q: [batch, heads, tokens, head_dim], k, v with fewer heads: textbook attention, every token to those before."""
    groups = q.shape[1] // k.shape[1]
    k, v = (round_int8(heads).repeat_interleave(groups, 1) for heads in (k, v))
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    weights = (q @ k.transpose(2, 3) * scaling).masked_fill(later, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("int8_kv", _attend)


def rounded_reference(folder: Path, dtype: torch.dtype = torch.float64) -> transformers.Glm4ForCausalLM:
    """The model in `folder`, its keys and values rounded to int8 (after the rotation, as a cache holds them).

    In double precision, where a matrix product's own rounding, which depends on how many rows are computed together,
    is too small to push a key over the border between two steps: so tests can ask for equality.
    """
    return transformers.Glm4ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="int8_kv").eval()
