"""Attention over a paged KV cache: blocks of tokens anywhere in memory, found through a table for each request."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4.ops.cpu.attention import PagedBatch, make_paged_batch


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """The keys or the values of one layer, a slot for each token, in the cache's own number format.

    int8 is symmetric, with one float32 scale for each token and head: x ≈ data · scale, scale = max |x| / 127. A token
    is rounded alone, so what the cache holds of it does not depend on the tokens that it is computed with.
    """

    data: Tensor
    """bfloat16, float32 or int8 [slots, kv_heads, head_dim]."""
    scales: Tensor | None
    """float32 [slots, kv_heads]; None where `data` is not int8."""

    @classmethod
    def empty(cls, slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> CacheTensor:
        """Room for `slots` tokens, not initialised."""
        data = torch.empty(slots, kv_heads, head_dim, dtype=dtype, device=device)
        if dtype != torch.int8:
            return cls(data, None)
        return cls(data, torch.empty(slots, kv_heads, dtype=torch.float32, device=device))

    @property
    def tensors(self) -> list[Tensor]:
        """All that a slot is made of: the first axis of each is the slots."""
        return [self.data] if self.scales is None else [self.data, self.scales]

    def write(self, slots: Tensor, x: Tensor) -> None:
        """Store x [tokens, kv_heads, head_dim] in `slots`, int64 [tokens]."""
        if self.scales is not None:
            x = x.float()
            # Of a zero head the scale must not be 0; infinity and NaN stay, so that the logits show them.
            scales = (x.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            self.scales[slots] = scales
            x = (x / scales[..., None]).round()
        self.data[slots] = x.to(self.data.dtype)

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """What `slots`, int64 [tokens], hold, as `dtype` [tokens, kv_heads, head_dim]."""
        data = self.data[slots]
        if self.scales is None:
            return data.to(dtype)
        # Not int8 · float32, which torch does not vectorise.
        return data.float().mul_(self.scales[slots][..., None]).to(dtype)


KVCache = list[tuple[CacheTensor, CacheTensor]]
"""Keys and values of each layer."""


@dataclass(frozen=True)
class AttentionBatch:
    """Where the tokens of one step stand: the same for every layer. What only some implementations want is made once,
    when it is first asked for."""

    slots: Tensor
    """int64 [tokens]: the place of each token's key and value, block · block_size + offset."""
    spans: list[tuple[int, int]]
    """Per request: the (first, end) rows of its tokens in the step."""
    starts: list[int]
    """Per request: the position of the first of them."""
    tables: list[list[int]]
    """Per request: its block table."""
    block_size: int

    @cached_property
    def context_slots(self) -> list[Tensor]:
        """Per request: int64 [context], the places of all its tokens so far, those of this step included."""
        device, found = self.slots.device, []
        offsets = torch.arange(self.block_size, device=device)
        for (first, end), start, table in zip(self.spans, self.starts, self.tables, strict=True):
            context = start + end - first
            blocks = torch.tensor(table[: -(-context // self.block_size)], device=device)
            found.append((blocks[:, None] * self.block_size + offsets).flatten()[:context])
        return found

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Per request: bool [new, context], which keys each new token sees; None where it sees them all."""
        found: list[Tensor | None] = []
        for (first, end), start in zip(self.spans, self.starts, strict=True):
            positions = torch.arange(start + end - first, device=self.slots.device)
            found.append(positions[None, :] <= positions[start:, None] if end - first > 1 else None)
        return found

    @cached_property
    def native(self) -> PagedBatch:
        """For the CPU kernels."""
        return make_paged_batch(self.spans, self.starts, self.tables, self.block_size)


def make_batch(
    spans: list[tuple[int, int]], starts: list[int], tables: list[list[int]], block_size: int, device: torch.device
) -> AttentionBatch:
    """Lay out a step: per request its rows, the position of its first new token, and its block table."""
    slots = [
        table[position // block_size] * block_size + position % block_size
        for (first, end), start, table in zip(spans, starts, tables, strict=True)
        for position in range(start, start + end - first)
    ]
    return AttentionBatch(torch.tensor(slots, device=device), spans, starts, tables, block_size)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: CacheTensor, v_cache: CacheTensor, batch: AttentionBatch
) -> Tensor:
    """Write this step's keys and values into the cache, then let each new token see its request's past and itself.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim];
    k_cache, v_cache: changed in place → [tokens, heads, head_dim].
    A token sees itself and its neighbours as the cache holds them, never as they were before they were rounded to its
    number format: so a prompt computed in chunks sees what one computed at once does.
    The query heads that share a key/value head are handled together, so that its cache is read once.
    """
    k_cache.write(batch.slots, k)
    v_cache.write(batch.slots, v)
    kv_heads = k.shape[1]
    out = torch.empty_like(q)
    for (first, end), places, mask in zip(batch.spans, batch.context_slots, batch.masks, strict=True):
        keys = k_cache.read(places, q.dtype).transpose(0, 1)[None]  # [1, kv_heads, context, head_dim]
        values = v_cache.read(places, q.dtype).transpose(0, 1)[None]
        new = end - first
        if new == 1:
            queries = q[first].view(1, kv_heads, -1, q.shape[-1])
            out[first] = F.scaled_dot_product_attention(queries, keys, values).view(q.shape[1:])
        else:
            queries = q[first:end].transpose(0, 1)[None]
            seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
            out[first:end] = seen[0].transpose(0, 1)
    return out
