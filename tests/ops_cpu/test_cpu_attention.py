"""The native attention against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm4.ops.cpu import library
from glm4.ops.cpu.attention import PagedBatch, make_paged_batch, paged_attention


def by_definition(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """softmax(q · kᵀ / √d) · v for one request, head by head; float64."""
    new, heads, dim = q.shape
    out = torch.empty(new, heads, dim, dtype=torch.float64)
    for t in range(new):
        for head in range(heads):
            kv = head // (heads // keys.shape[1])
            seen = slice(0, start + t + 1)
            weights = torch.softmax(keys[seen, kv].double() @ q[t, head].double() / dim**0.5, dim=0)
            out[t, head] = weights @ values[seen, kv].double()
    return out


class Case:
    """Some requests whose blocks lie anywhere in a cache full of NaN elsewhere."""

    def __init__(
        self,
        requests: list[tuple[int, int]],
        kv_heads: int,
        group: int,
        dim: int,
        block_size: int,
        cache: str,
        seed: int,
    ) -> None:
        """requests: (tokens in the cache already, new tokens) of each."""
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-(start + new) // block_size) for start, new in requests]
        blocks = torch.randperm(sum(needed) + 3, generator=generator).tolist()
        tables = [[blocks.pop() for _ in range(count)] for count in needed]
        slots = (sum(needed) + 3) * block_size
        rows = sum(new for _, new in requests)
        self.q = torch.randn(rows, kv_heads * group, dim, generator=generator) * 2
        ends = torch.tensor([new for _, new in requests]).cumsum(0).tolist()
        self.spans = [(end - new, end) for end, (_, new) in zip(ends, requests, strict=True)]
        self.starts = [start for start, _ in requests]
        self.batch: PagedBatch = make_paged_batch(self.spans, self.starts, tables, block_size)
        self.places = [
            torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(start + new)])
            for table, (start, new) in zip(tables, requests, strict=True)
        ]
        shape = (slots, kv_heads, dim)
        self.k_scales = self.v_scales = None
        if cache == "int8":
            self.k, self.v = (torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for _ in range(2))
            self.k_scales, self.v_scales = (torch.rand(slots, kv_heads, generator=generator) * 0.02 for _ in range(2))
        else:
            dtype = torch.bfloat16 if cache == "bfloat16" else torch.float32
            self.k, self.v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
            used = torch.cat([torch.empty(0, dtype=torch.int64), *self.places])
            for tensor in (self.k, self.v):
                unused = torch.ones(slots, dtype=torch.bool)
                unused[used] = False
                tensor[unused] = torch.nan

    def run(self, q: Tensor | None = None) -> Tensor:
        return paged_attention(self.q if q is None else q, self.k, self.v, self.batch, self.k_scales, self.v_scales)

    def expected(self, magnitudes: bool = False) -> Tensor:
        """The attention itself, or, for bounds on errors, that of the values' magnitudes."""
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for (first, end), start, places in zip(self.spans, self.starts, self.places, strict=True):
            keys, values = self.k[places].double(), self.v[places].double()
            if self.k_scales is not None and self.v_scales is not None:
                keys, values = keys * self.k_scales[places][..., None], values * self.v_scales[places][..., None]
            out[first:end] = by_definition(self.q[first:end], keys, values.abs() if magnitudes else values, start)
        return out


cases = st.builds(
    Case,
    requests=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 6)), min_size=0, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 4, 6, 16]),
    dim=st.sampled_from([16, 32, 128]),
    block_size=st.sampled_from([1, 5, 16]),
    cache=st.sampled_from(["float32", "bfloat16", "int8"]),
    seed=st.integers(0, 9),
)


@given(case=cases, threads=st.integers(1, 4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_equals_the_definition(isas: list[str], case: Case, threads: int) -> None:
    library.set_threads(threads)
    expected = case.expected()
    for isa in isas:
        library.select_isa(isa)
        torch.testing.assert_close(case.run().double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_a_context_of_several_splits_and_any_number_of_threads(isas: list[str], cache: str) -> None:
    case = Case([(2500, 2), (1023, 1), (0, 40)], 2, 16, 32, 16, cache, 0)
    expected = case.expected()
    for isa in isas:
        library.select_isa(isa)
        library.set_threads(1)
        alone = case.run()
        torch.testing.assert_close(alone.double(), expected, rtol=2e-5, atol=2e-5)
        library.set_threads(3)
        assert torch.equal(case.run(), alone)


def test_a_row_does_not_depend_on_its_neighbours(isas: list[str]) -> None:
    """A prompt at once, in chunks, and token by token gives the same bits."""
    case = Case([(0, 90)], 2, 4, 32, 16, "bfloat16", 1)
    table = case.batch.tables[0].tolist()
    for isa in isas:
        library.select_isa(isa)
        whole = case.run()
        for size in (1, 7, 32):
            parts = []
            for first in range(0, 90, size):
                rows = case.q[first : first + size]
                batch = make_paged_batch([(0, len(rows))], [first], [table], 16)
                parts.append(paged_attention(rows, case.k, case.v, batch))
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_bfloat16_queries(isas: list[str], cache: str) -> None:
    """The result is rounded to bfloat16, and the weights of the values may be."""
    case = Case([(70, 1), (3, 5), (1100, 2)], 2, 16, 128, 16, cache, 2)
    case.q = case.q.bfloat16().float()
    expected, magnitudes = case.expected(), case.expected(magnitudes=True)
    bound = 2**-8 * expected.abs() + 2**-8 * magnitudes
    for isa in isas:
        library.select_isa(isa)
        for threads in (1, 3):
            library.set_threads(threads)
            out = case.run(case.q.bfloat16())
            assert out.dtype is torch.bfloat16
            assert ((out.double() - expected).abs() <= bound).all()


def test_a_query_that_is_not_finite_spoils_its_own_row_only(isas: list[str]) -> None:
    case = Case([(70, 3)], 1, 4, 32, 16, "float32", 3)
    for isa in isas:
        library.select_isa(isa)
        clean = case.run()
        q = case.q.clone()
        q[1, 2, 5] = torch.nan
        out = case.run(q)
        assert out[1, 2].isnan().all()
        out[1, 2] = clean[1, 2]
        assert torch.equal(out, clean)


def test_what_does_not_fit_is_refused(isas: list[str]) -> None:
    with pytest.raises(ValueError, match="33 positions do not fit into 2 blocks of 16"):
        make_paged_batch([(0, 1)], [32], [[0, 1]], 16)
    case = Case([(0, 2)], 2, 4, 32, 16, "float32", 0)
    with pytest.raises(ValueError, match="int8"):
        paged_attention(case.q, case.k, case.v, case.batch, torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="alike"):
        paged_attention(case.q, case.k, case.v.transpose(0, 1).contiguous().transpose(0, 1), case.batch)
    for block in (-1, 5):
        with pytest.raises(ValueError, match="outside the cache of 64 slots"):
            paged_attention(case.q, case.k, case.v, make_paged_batch([(0, 2)], [0], [[block]], 16))
    with pytest.raises(ValueError, match="no attention"):
        paged_attention(case.q[:, :7], case.k, case.v, case.batch)
