"""The native norm, SwiGLU, rotary and cache writes against the readable operations."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm4.ops import fused
from glm4.ops.activation import swiglu as readable_swiglu
from glm4.ops.cpu import library
from glm4.ops.cpu.attention import rotate_and_store
from glm4.ops.cpu.layer import add_norm, argmax, swiglu
from glm4.ops.norm import rms_norm
from glm4.ops.rotary import apply_rotary

every_shape = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """Differences in units of the format's precision at the larger one."""
    scale = torch.maximum(a.abs(), b.abs()).double().clamp(min=1e-6) * torch.finfo(a.dtype).eps
    return (a.double() - b.double()).abs() / scale


@given(tokens=st.integers(0, 9), size=st.integers(1, 200), dtype=dtypes, threads=st.integers(1, 3))
@every_shape
def test_add_norm(isas: list[str], tokens: int, size: int, dtype: torch.dtype, threads: int) -> None:
    residual, branch = random(tokens, size, seed=1, dtype=dtype), random(tokens, size, seed=2, dtype=dtype) * 3
    first, second = random(size, seed=3, dtype=dtype), random(size, seed=4, dtype=dtype)
    library.set_threads(threads)
    normed = rms_norm(branch, first, 1e-5)
    wanted = residual + normed
    for isa in isas:
        library.select_isa(isa)
        hidden, out = add_norm(residual, branch, first, second, 1e-5)
        # The sum of squares is added up in another order, so a rounding may fall to the other side.
        apart = (hidden.double() - wanted.double()).abs()
        assert (apart <= torch.finfo(dtype).eps * 4 * (normed.abs() + wanted.abs()).double()).all()
        assert (steps_apart(out, rms_norm(hidden, second, 1e-5)) <= 4).all()
        same, alone = add_norm(hidden, None, None, second, 1e-5)
        assert same is hidden and torch.equal(alone, out)
        last, itself = add_norm(residual, branch, first, None, 1e-5)
        assert torch.equal(last, hidden) and itself is last


@given(tokens=st.integers(0, 9), size=st.integers(1, 200), dtype=dtypes, scale=st.sampled_from([1.0, 30.0, 1e4]))
@every_shape
def test_swiglu(isas: list[str], tokens: int, size: int, dtype: torch.dtype, scale: float) -> None:
    gate_up = random(tokens, 2 * size, dtype=dtype) * scale
    for isa in isas:
        library.select_isa(isa)
        assert (steps_apart(swiglu(gate_up), readable_swiglu(gate_up)) <= 4).all()


def test_swiglu_keeps_what_is_not_finite(isas: list[str]) -> None:
    gate_up = torch.tensor([[torch.nan, torch.inf, 1.0, -1000.0, 2.0, 2.0, torch.nan, 2.0]])
    for isa in isas:
        library.select_isa(isa)
        torch.testing.assert_close(swiglu(gate_up), readable_swiglu(gate_up), equal_nan=True)


@given(rows=st.integers(0, 5), size=st.integers(1, 300), data=st.data(), dtype=dtypes)
@every_shape
def test_argmax(isas: list[str], rows: int, size: int, data: st.DataObject, dtype: torch.dtype) -> None:
    """Numbers that repeat, so that the first of several is asked for, and one that may be beyond `known`."""
    known, seed = data.draw(st.integers(1, size)), data.draw(st.integers(0, 99))
    worst = data.draw(st.sampled_from([None, torch.nan, torch.inf, -torch.inf]))
    logits = random(rows, size + 3, seed=seed).mul(3).round().to(dtype)[:, :size]
    expected = logits[:, :known].argmax(-1)
    if worst is not None and rows:
        logits[-1, data.draw(st.integers(0, size - 1))] = worst
        expected[-1] = -1
    for isa in isas:
        library.select_isa(isa)
        assert argmax(logits, known) == expected.tolist()
    with mock.patch.object(fused, "computes", lambda x: False):
        assert fused.argmax(logits, known) == expected.tolist()


@given(
    tokens=st.integers(0, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([16, 32, 128]),
    turned=st.sampled_from([2, 1, 0]),
    dtype=dtypes,
    cache=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    threads=st.integers(1, 3),
)
@every_shape
def test_rotate_and_store(
    isas: list[str],
    tokens: int,
    kv_heads: int,
    group: int,
    dim: int,
    turned: int,
    dtype: torch.dtype,
    cache: torch.dtype,
    threads: int,
) -> None:
    """q, k and v lie side by side, as the fused projection leaves them."""
    heads, rotary = kv_heads * group, dim // 4 * turned
    qkv = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    cos, sin = random(tokens, rotary // 2, seed=1, dtype=dtype), random(tokens, rotary // 2, seed=2, dtype=dtype)
    slots = torch.randperm(tokens + 5, generator=torch.Generator().manual_seed(3))[:tokens]
    library.set_threads(threads)
    for isa in isas:
        library.select_isa(isa)
        q, k, v = (
            part.unflatten(1, (-1, dim))
            for part in qkv.clone().split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        )
        wanted_q, wanted_k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        k_cache = torch.zeros(tokens + 5, kv_heads, dim).to(cache)
        v_cache = k_cache.clone()
        scales = [torch.zeros(tokens + 5, kv_heads) for _ in range(2)] if cache is torch.int8 else [None, None]
        rotate_and_store(q, k, v, cos, sin, slots, k_cache, v_cache, *scales)
        assert torch.equal(q, wanted_q)
        for stored, scale, wanted in ((k_cache, scales[0], wanted_k), (v_cache, scales[1], v)):
            if scale is None:
                assert torch.equal(stored[slots], wanted.to(cache))
            else:
                largest = wanted.float().abs().amax(-1)
                torch.testing.assert_close(scale[slots], largest / 127)
                error = (stored[slots].float() * scale[slots][..., None] - wanted.float()).abs()
                assert (error <= 0.5001 * scale[slots][..., None]).all()
        untouched = torch.ones(tokens + 5, dtype=torch.bool)
        untouched[slots] = False
        assert not k_cache[untouched].any() and not v_cache[untouched].any()


def test_a_slot_outside_the_cache_is_refused(isas: list[str]) -> None:
    x, angles = torch.zeros(1, 1, 16), torch.zeros(1, 4)
    cache = torch.zeros(3, 1, 16)
    for slot in (-1, 3):
        with pytest.raises(ValueError, match="outside the cache of 3"):
            rotate_and_store(x, x, x, angles, angles, torch.tensor([slot]), cache, cache.clone())
