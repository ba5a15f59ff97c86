"""What the KV cache's number formats keep of a key, against NumPy and textbook attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glm4.ops.attention import CacheTensor, make_batch, paged_attention

CPU = torch.device("cpu")
HEADS, HEAD_DIM = 2, 8


def stored(x: Tensor, dtype: torch.dtype, slots: Tensor | None = None) -> CacheTensor:
    cache = CacheTensor.empty(64, *x.shape[1:], dtype, CPU)
    cache.write(torch.arange(len(x)) if slots is None else slots, x)
    return cache


def random_rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose sizes differ by orders of magnitude, as those of real heads do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(count, HEADS, 1).uniform_(-3, 3, generator=generator)
    return (torch.randn(count, HEADS, HEAD_DIM, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_nearest_of_255_steps(dtype: torch.dtype) -> None:
    x = random_rows(64, dtype=dtype)
    exact = x.double().numpy()
    steps = np.abs(exact).max(-1, keepdims=True) / 127
    cache = stored(x, torch.int8)
    assert np.abs(cache.data.numpy() - exact / steps).max() <= 0.5 + 1e-5
    assert np.abs(cache.data.numpy()).max(-1).tolist() == [[127] * HEADS] * 64
    found = cache.read(torch.arange(64), torch.float32).double().numpy()
    assert (np.abs(found - exact) <= steps * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float_formats_keep_what_they_can(kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x = random_rows(64, dtype=dtype)
    assert torch.equal(stored(x, kv_dtype).read(torch.arange(64), dtype), x.to(kv_dtype).to(dtype))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.permutations(range(45)), st.integers(0, 99))
def test_neighbours_change_nothing(sizes: list[int], slots: list[int], seed: int) -> None:
    """The same bits, in whatever pieces and into whatever slots the tokens are written."""
    x = random_rows(sum(sizes), seed)
    places = torch.tensor(slots[: len(x)])
    at_once, in_pieces = stored(x, torch.int8), CacheTensor.empty(64, HEADS, HEAD_DIM, torch.int8, CPU)
    for rows, where in zip(x.split(sizes), places.split(sizes), strict=True):
        in_pieces.write(where, rows)
    for one, other in zip(at_once.tensors, in_pieces.tensors, strict=True):
        assert torch.equal(one[: len(x)], other[places])


@pytest.mark.parametrize("smallest", [0.0, 1e-45, 1.9e-43, 1e-38])
def test_nothing_much_stays_nothing_much(smallest: float) -> None:
    x = torch.full((1, HEADS, HEAD_DIM), smallest)
    x[0, 1] = 1.0
    found = stored(x, torch.int8).read(torch.arange(1), torch.float32)
    assert 0 <= found[0, 0].min() <= found[0, 0].max() <= 1.2e-38
    assert torch.allclose(found[0, 1], torch.ones(HEAD_DIM))


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_hidden(broken: float) -> None:
    """A damaged weight must still reach the logits, where the runner looks for it."""
    x = torch.ones(1, HEADS, HEAD_DIM)
    x[0, 0, 3] = broken
    found = stored(x, torch.int8).read(torch.arange(1), torch.float32)
    assert not found[0, 0].isfinite().any()
    assert found[0, 1].isfinite().all()


@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12, [11, 1]], ids=str)
def test_a_chunk_attends_to_itself_as_the_cache_holds_it(chunks: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(12, 3 * HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 12, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    k_cache, v_cache = (CacheTensor.empty(20, HEADS, HEAD_DIM, torch.int8, CPU) for _ in range(2))
    table, found, start = [3, 0, 4], [], 0
    for size in chunks:
        batch = make_batch([(0, size)], [start], [table], 4, CPU)
        rows = slice(start, start + size)
        found.append(paged_attention(q[rows], k[rows], v[rows], k_cache, v_cache, batch))
        start += size
    rounded_k, rounded_v = ((x / (s := x.abs().amax(-1, keepdim=True) / 127)).round() * s for x in (k, v))
    expected = torch.empty_like(q)
    for token in range(12):
        for head in range(3 * HEADS):
            scores = rounded_k[: token + 1, head // 3] @ q[token, head] / HEAD_DIM**0.5
            expected[token, head] = scores.softmax(0) @ rounded_v[: token + 1, head // 3]
    assert (torch.cat(found) - expected).abs().max() <= 1e-6
