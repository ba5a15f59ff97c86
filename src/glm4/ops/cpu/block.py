"""A whole decoder block in one call of the kernels: at one token the calls between them would cost a twentieth."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from glm4.ops.cpu.attention import CACHE_FORMATS, PagedBatch, accepts
from glm4.ops.cpu.library import DTYPES, AttentionStruct, BlockStruct, KvWriteStruct, StepStruct, need
from glm4.ops.cpu.linear import PackedLinear


class NativeBlock:
    """A block's weights as the kernels take them."""

    def __init__(self, linears: Sequence[PackedLinear], norms: Sequence[Tensor]) -> None:
        """linears: q, k, v, o, gate_up, down; norms: after attention, before and after the MLP, before the next block.

        Raises ValueError where they do not go together.
        """
        q, k, v, o, gate_up, down = linears
        size = q.in_features
        fits = (
            {each.in_features for each in (k, v, gate_up)} == {size}
            and k.out_features == v.out_features
            and (o.in_features, o.out_features) == (q.out_features, size)
            and (2 * down.in_features, down.out_features) == (gate_up.out_features, size)
            and all(norm.shape == (size,) and norm.is_contiguous() for norm in norms)
        )
        if not fits:
            raise ValueError("these weights make no decoder block")
        self.size, self.q_size, self.kv_size, self.intermediate = size, q.out_features, k.out_features, down.in_features
        self.dtype = norms[0].dtype
        self._kept = (*linears, *norms)
        self.struct = BlockStruct(
            *(ctypes.pointer(each.struct) for each in linears), *(norm.data_ptr() for norm in norms)
        )

    @staticmethod
    def accepts(linears: Sequence[object], norms: Sequence[Tensor], head_dim: int) -> bool:
        """Whether the kernels compute all of such a block."""
        return (
            all(isinstance(each, PackedLinear) for each in linears)
            and len({norm.dtype for norm in norms}) == 1
            and norms[0].dtype in DTYPES
            and accepts(head_dim)
        )


class NativeStep:
    """One step on its way through the blocks."""

    def __init__(
        self, hidden: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, batch: PagedBatch,
        block: NativeBlock, head_dim: int, eps: float,
    ) -> None:  # fmt: skip
        """hidden, normed: [tokens, size], the residual stream and the first block's input, both dense and changed in
        place by each block; cos, sin: [tokens, rotary_dim/2]; slots: int64 [tokens]; block: one of those to come, which
        are all of one shape.

        Raises ValueError for what does not fit that block.
        """
        tokens, dtype = len(hidden), hidden.dtype
        given = (hidden, normed, cos, sin, slots)
        fits = (
            hidden.shape == normed.shape == (tokens, block.size)
            and cos.shape == sin.shape == (tokens, cos.shape[1])
            and 2 * cos.shape[1] <= head_dim
            and slots.shape == (tokens,)
            and {normed.dtype, cos.dtype, sin.dtype, block.dtype} == {dtype}
            and all(each.is_contiguous() for each in given)
        )
        if not fits:
            raise ValueError(f"a step of {dtype} {list(hidden.shape)} does not go through blocks of {block.size}")

        def room(width: int) -> Tensor:
            return torch.empty(tokens, width, dtype=dtype)

        q, k, v, attended = room(block.q_size), room(block.kv_size), room(block.kv_size), room(block.q_size)
        branch, gate_up, gated = room(block.size), room(2 * block.intermediate), room(block.intermediate)
        self._kept = (*given, batch, q, k, v, attended, branch, gate_up, gated)
        self._head_dim, self._kv_heads = head_dim, block.kv_size // head_dim
        heads, code = block.q_size // head_dim, DTYPES[dtype]
        write = KvWriteStruct(
            tokens=tokens, heads=heads, kv_heads=self._kv_heads, head_dim=head_dim, rotary_dim=2 * cos.shape[1],
            dtype=code, q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(),
            q_stride=block.q_size, k_stride=block.kv_size, v_stride=block.kv_size,
            cosines=cos.data_ptr(), sines=sin.data_ptr(), places=slots.data_ptr(),
        )  # fmt: skip
        attention = AttentionStruct(
            heads=heads, kv_heads=self._kv_heads, head_dim=head_dim, scale=head_dim**-0.5, dtype=code,
            q=q.data_ptr(), out=attended.data_ptr(), q_stride=block.q_size, out_stride=block.q_size,
            requests=len(batch.starts), block_size=batch.block_size, spans=batch.spans.data_ptr(),
            starts=batch.starts.data_ptr(), tables=batch.tables.data_ptr(), table_stride=batch.tables.stride(0),
        )  # fmt: skip
        self._struct = StepStruct(
            write=write, attention=attention, hidden=hidden.data_ptr(), normed=normed.data_ptr(),
            branch=branch.data_ptr(), gate_up=gate_up.data_ptr(),
            gated=gated.data_ptr(), eps=eps,
        )  # fmt: skip
        self._cache: tuple[object, ...] | None = None

    def run(
        self, block: NativeBlock, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
    ) -> None:
        """Go through one block. The caches are as `attention.paged_attention` takes them, dense and all of one shape.

        Raises ValueError where a slot or a block of a table lies outside them.
        """
        kind = (k_cache.shape, k_cache.dtype, v_cache.shape, v_cache.dtype, k_scales is None, v_scales is None)
        if kind != self._cache:
            self._take_cache(k_cache, v_cache, k_scales, v_scales)
            self._cache = kind
        struct = block.struct
        struct.k_cache, struct.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
        if k_scales is not None and v_scales is not None:
            struct.k_scales, struct.v_scales = k_scales.data_ptr(), v_scales.data_ptr()
        if need().glm4_block(struct, self._struct):
            raise ValueError(f"a slot or a block lies outside the cache of {len(k_cache)} slots")

    def _take_cache(self, *cache: Tensor | None) -> None:
        k_cache, v_cache, k_scales, v_scales = cache
        assert k_cache is not None and v_cache is not None
        scaled = k_cache.dtype is torch.int8
        fits = (
            k_cache.shape == v_cache.shape == (len(k_cache), self._kv_heads, self._head_dim)
            and k_cache.dtype is v_cache.dtype
            and k_cache.dtype in CACHE_FORMATS
            and (k_scales is not None) == (v_scales is not None) == scaled
            and all(each.is_contiguous() for each in cache if each is not None)
        )
        if not fits:
            raise ValueError(f"a cache of {k_cache.dtype} {list(k_cache.shape)} does not go with these blocks")
        for part in (self._struct.write, self._struct.attention):
            part.slots, part.kv_stride = len(k_cache), self._kv_heads * self._head_dim
            part.cache_format = CACHE_FORMATS[k_cache.dtype]
