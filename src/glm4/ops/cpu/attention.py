"""Attention over the paged cache on the native kernels: keys and values are read once for the heads that share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glm4.ops.cpu.library import DTYPES, AttentionStruct, KvWriteStruct, need

CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MOST_POSITIONS = 262144


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the tokens of one step stand: made once, used by every layer."""

    spans: Tensor
    """int64 [requests, 2]: the (first, end) rows of each request's tokens in the step."""
    starts: Tensor
    """int64 [requests]: the position of the first of them."""
    tables: Tensor
    """int32 [requests, blocks]: each request's block table, padded at its end."""
    block_size: int


def make_paged_batch(
    spans: list[tuple[int, int]], starts: list[int], tables: list[list[int]], block_size: int
) -> PagedBatch:
    """Lay out a step: per request its rows, the position of its first new token, and its block table.

    Raises ValueError where a table is too short for its request's tokens, or a context too long for the kernels.
    """
    for (first, end), start, table in zip(spans, starts, tables, strict=True):
        context = start + end - first
        if context > min(MOST_POSITIONS, len(table) * block_size):
            raise ValueError(f"{context} positions do not fit into {len(table)} blocks of {block_size}")
    longest = max(map(len, tables), default=0)
    padded = [table + [0] * (longest - len(table)) for table in tables]
    return PagedBatch(
        torch.tensor(spans, dtype=torch.int64).view(-1, 2),
        torch.tensor(starts, dtype=torch.int64),
        torch.tensor(padded, dtype=torch.int32).view(len(tables), longest),
        block_size,
    )


def accepts(head_dim: int) -> bool:
    """Whether the kernel knows heads of this size."""
    return head_dim % 16 == 0 and head_dim <= 512


def _check_cache(k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> None:
    head_dim = k_cache.shape[2]
    if (k_cache.dtype is torch.int8) != (k_scales is not None and v_scales is not None):
        raise ValueError("an int8 cache needs scales, and no other has them")
    alike = (k_cache.shape, k_cache.stride(), k_cache.dtype) == (v_cache.shape, v_cache.stride(), v_cache.dtype)
    if not alike or k_cache.stride()[1:] != (head_dim, 1) or k_cache.dtype not in CACHE_FORMATS:
        raise ValueError("k_cache and v_cache must lie alike in memory, each slot's heads together")
    for scales in (k_scales, v_scales):
        if scales is not None and (scales.shape != k_cache.shape[:2] or not scales.is_contiguous()):
            raise ValueError(f"scales of {list(scales.shape)} do not go with a cache of {list(k_cache.shape)}")


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Turn q in place and k by their positions' angles (see ops.rotary.apply_rotary), and put k and v into the cache.

    q: float32 or bfloat16 [tokens, heads, head_dim], each token's heads together; k, v: [tokens, kv_heads, head_dim];
    cos, sin: [tokens, rotary_dim/2], of q's dtype; slots: int64 [tokens]; the cache as paged_attention takes it. An
    int8 cache gets round(127 · x / max|x|) of each token and head, and the scale max|x| / 127.
    """
    tokens, heads, head_dim = q.shape
    _check_cache(k_cache, v_cache, k_scales, v_scales)
    rotary_dim = 2 * cos.shape[1]
    packed = all(x.stride()[1:] == (head_dim, 1) for x in (q, k, v)) and all(
        x.is_contiguous() for x in (cos, sin, slots)
    )
    fits = (
        k.shape == v.shape == (tokens, k_cache.shape[1], k_cache.shape[2])
        and cos.shape == sin.shape == (tokens, rotary_dim // 2)
        and slots.shape == (tokens,)
        and {k.dtype, v.dtype, cos.dtype, sin.dtype} == {q.dtype}
        and q.dtype in DTYPES
    )
    if not (packed and fits and accepts(head_dim) and head_dim == k_cache.shape[2] and rotary_dim <= head_dim):
        raise ValueError(f"the CPU kernels cannot store {k.dtype} {list(k.shape)} in {list(k_cache.shape)}")
    outside = need().glm4_rotate_and_store(
        KvWriteStruct(
            tokens=tokens,
            heads=heads,
            kv_heads=k.shape[1],
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            dtype=DTYPES[q.dtype],
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            v_stride=v.stride(0),
            cosines=cos.data_ptr(),
            sines=sin.data_ptr(),
            places=slots.data_ptr(),
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            slots=k_cache.shape[0],
            kv_stride=k_cache.stride(0),
            cache_format=CACHE_FORMATS[k_cache.dtype],
            k_scales=None if k_scales is None else k_scales.data_ptr(),
            v_scales=None if v_scales is None else v_scales.data_ptr(),
        )
    )
    if outside:
        raise ValueError(f"a slot lies outside the cache of {k_cache.shape[0]}")


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Let each new token see its request's past and itself; the step's keys and values are in the cache already.

    q: float32 or bfloat16 [tokens, heads, head_dim]; k_cache, v_cache: float32, bfloat16 or int8
    [slots, kv_heads, head_dim]; k_scales, v_scales: float32 [slots, kv_heads], for int8 → like q.
    A row's result is the same, bit for bit, whatever the other rows and the number of threads; products and sums are
    float32. Rows that belong to no request are left undefined.
    """
    slots, kv_heads, head_dim = k_cache.shape
    heads = q.shape[1]
    _check_cache(k_cache, v_cache, k_scales, v_scales)
    if not accepts(head_dim) or q.shape[2] != head_dim or heads % kv_heads or q.dtype not in DTYPES:
        raise ValueError(f"the CPU kernels know no attention of {q.dtype} {list(q.shape)} on {list(k_cache.shape)}")
    if q.stride()[1:] != (head_dim, 1):
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype)
    outside = need().glm4_attention(
        AttentionStruct(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            dtype=DTYPES[q.dtype],
            q=q.data_ptr(),
            out=out.data_ptr(),
            q_stride=q.stride(0),
            out_stride=out.stride(0),
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            slots=slots,
            kv_stride=k_cache.stride(0),
            cache_format=CACHE_FORMATS[k_cache.dtype],
            k_scales=None if k_scales is None else k_scales.data_ptr(),
            v_scales=None if v_scales is None else v_scales.data_ptr(),
            requests=batch.starts.shape[0],
            block_size=batch.block_size,
            spans=batch.spans.data_ptr(),
            starts=batch.starts.data_ptr(),
            tables=batch.tables.data_ptr(),
            table_stride=batch.tables.stride(0),
        )
    )
    if outside:
        raise ValueError(f"a block table names a block outside the cache of {slots} slots")
    return out
