"""Attention over a paged KV cache: blocks of tokens anywhere in memory, found through a table for each request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the tokens of one step stand: the same for every layer."""

    slots: Tensor
    """int64 [tokens]: the place of each token's key and value, block · block_size + offset."""
    spans: list[tuple[int, int]]
    """Per request: the (first, end) rows of its tokens in the step."""
    context_slots: list[Tensor]
    """Per request: int64 [context], the places of all its tokens so far, those of this step included."""
    masks: list[Tensor | None]
    """Per request: bool [new, context], which keys each new token sees; None where it sees them all."""


def make_batch(
    spans: list[tuple[int, int]], starts: list[int], tables: list[list[int]], block_size: int, device: torch.device
) -> AttentionBatch:
    """Lay out a step: per request its rows, the position of its first new token, and its block table."""
    context_slots, slots, masks = [], [], []
    offsets = torch.arange(block_size, device=device)
    for (first, end), start, table in zip(spans, starts, tables, strict=True):
        context, new = start + end - first, end - first
        blocks = torch.tensor(table[: -(-context // block_size)], device=device)
        places = (blocks[:, None] * block_size + offsets).flatten()[:context]
        context_slots.append(places)
        slots.append(places[start:])
        mask = None
        if new > 1:
            positions = torch.arange(context, device=device)
            mask = positions[None, :] <= positions[start:, None]
        masks.append(mask)
    return AttentionBatch(torch.cat(slots), spans, context_slots, masks)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> Tensor:
    """Write this step's keys and values into the cache, then let each new token see its request's past and itself.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim];
    k_cache, v_cache: [slots, kv_heads, head_dim], changed in place → [tokens, heads, head_dim].
    The query heads that share a key/value head are handled together, so that its cache is read once.
    """
    k_cache[batch.slots] = k.to(k_cache.dtype)
    v_cache[batch.slots] = v.to(v_cache.dtype)
    kv_heads = k.shape[1]
    out = torch.empty_like(q)
    for (first, end), places, mask in zip(batch.spans, batch.context_slots, batch.masks, strict=True):
        keys = k_cache[places].to(q.dtype).transpose(0, 1)[None]  # [1, kv_heads, context, head_dim]
        values = v_cache[places].to(q.dtype).transpose(0, 1)[None]
        new = end - first
        if new == 1:
            queries = q[first].view(1, kv_heads, -1, q.shape[-1])
            out[first] = F.scaled_dot_product_attention(queries, keys, values).view(q.shape[1:])
        else:
            queries = q[first:end].transpose(0, 1)[None]
            seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
            out[first:end] = seen[0].transpose(0, 1)
    return out
