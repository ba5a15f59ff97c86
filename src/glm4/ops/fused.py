"""What a model computes between and after its matrix products: on the native kernels where they run, else in torch.

Here alone it is decided. The torch forms are those of `norm`, `activation`, `rotary` and `attention`, operation by
operation, and the kernels are tested against them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm4.ops import activation, attention, norm
from glm4.ops.attention import AttentionBatch, CacheTensor, KVCache
from glm4.ops.cpu import attention as cpu_attention
from glm4.ops.cpu import layer as cpu_layer
from glm4.ops.cpu.block import NativeBlock, NativeStep
from glm4.ops.cpu.library import computes
from glm4.ops.cpu.linear import PackedLinear
from glm4.ops.rotary import apply_rotary


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`norm.rms_norm`; x: [tokens, size], weight: [size], of one dtype."""
    return cpu_layer.add_norm(x, None, None, weight, eps)[1] if computes(x) else norm.rms_norm(x, weight, eps)


def add_norm(
    residual: Tensor, branch: Tensor, branch_weight: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden = residual + rms_norm(branch, branch_weight) → (hidden, rms_norm(hidden, weight)).

    residual, branch: [tokens, size]; branch_weight, weight: [size]; all of one dtype.
    """
    if computes(residual):
        return cpu_layer.add_norm(residual, branch, branch_weight, weight, eps)
    hidden = residual + norm.rms_norm(branch, branch_weight, eps)
    return hidden, norm.rms_norm(hidden, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """up · silu(gate); gate_up: [tokens, 2·size], the gate's half first → [tokens, size]."""
    return cpu_layer.swiglu(gate_up) if computes(gate_up) else activation.swiglu(gate_up)


def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: CacheTensor,
    v_cache: CacheTensor,
    batch: AttentionBatch,
) -> Tensor:
    """Turn q and k by their positions' angles, then `attention.paged_attention`; q may be overwritten.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim]; cos, sin: [tokens, rotary_dim/2];
    k_cache, v_cache: changed in place → [tokens, heads, head_dim].
    """
    if not (computes(q) and cpu_attention.accepts(q.shape[-1])):
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return attention.paged_attention(q, k, v, k_cache, v_cache, batch)
    cache = (k_cache.data, v_cache.data, k_cache.scales, v_cache.scales)
    cpu_attention.rotate_and_store(q, k, v, cos, sin, batch.slots, *cache)
    return cpu_attention.paged_attention(q, k_cache.data, v_cache.data, batch.native, *cache[2:])


def argmax(logits: Tensor, known: int) -> list[int]:
    """The first of the largest among the first `known` of each row; -1 for a row that is not finite anywhere.

    logits: float32 or bfloat16 [rows, size].
    """
    if computes(logits):
        return cpu_layer.argmax(logits, known)
    picked: list[int] = logits[:, :known].argmax(-1).where(finite_rows(logits), -1).tolist()
    return picked


def finite_rows(x: Tensor) -> Tensor:
    """bool [rows]: whether all of a row is finite. x: [rows, size]."""
    return x.sum(-1, dtype=torch.float32).isfinite()  # one pass; isfinite on all of them takes several


def make_native_blocks(
    blocks: Sequence[tuple[Sequence[object], Sequence[Tensor]]], head_dim: int
) -> list[NativeBlock] | None:
    """Decoder blocks that the kernels compute in one call each; None where they do not compute every part of them.

    blocks: each one's linear layers (q, k, v, o, gate_up, down) and norms (after attention, before and after the MLP,
    before the next block).
    """
    if not all(NativeBlock.accepts(linears, norms, head_dim) for linears, norms in blocks):
        return None
    return [
        NativeBlock([each for each in linears if isinstance(each, PackedLinear)], norms) for linears, norms in blocks
    ]


def run_native_blocks(
    blocks: list[NativeBlock],
    x: Tensor,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: KVCache,
    batch: AttentionBatch,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The residual stream x and what the first block's norm made of it, both [tokens, size] → the same after the last.

    Bit for bit what the functions above and the linear layers compute by calls of their own.
    """
    head_dim = kv_cache[0][0].data.shape[2]
    x = x.clone()
    step = NativeStep(x, normed, cos, sin, batch.slots, batch.native, blocks[0], head_dim, eps)
    for block, (keys, values) in zip(blocks, kv_cache, strict=True):
        step.run(block, keys.data, values.data, keys.scales, values.scales)
    return x, normed
