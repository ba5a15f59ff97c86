"""Rounding to 4 and 8 bits against the true optimum, found by brute force, and against the usual simple rules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from glm4.quantization import quantize as module
from glm4.quantization.layout import Layout
from glm4.quantization.quantize import pack_nibbles, quantize, unpack_nibbles

DEMO = Path(__file__).resolve().parents[2] / "demo" / "glm4-demo"
GROUPS = 40


def least_error(numbers: Tensor) -> float:
    """The least squared error that 4 bits with any scale and any zero point of 0 … 15 leave of `numbers` [n].

    For a zero point, the integers only change where scale times a half-integer is one of the numbers: between two such
    scales they are fixed, and the best scale for them follows.
    """
    numbers = numbers.double()
    halves = torch.arange(16) + 0.5
    borders = torch.unique(numbers.abs()[:, None] / halves).clamp(min=1e-12)
    scales = torch.cat([borders[:1] / 2, (borders[1:] + borders[:-1]) / 2, borders[-1:] * 2])
    errors = []
    for zero in range(16):
        integers = (numbers / scales[:, None]).round().clamp(-zero, 15 - zero)
        squares = (integers * integers).sum(-1)
        best = (integers @ numbers) / squares.clamp(min=1)
        errors.append(((numbers - best[:, None] * integers) ** 2).sum(-1).min())
    return float(torch.stack(errors).min())


def errors(numbers: Tensor, layout: Layout) -> Tensor:
    """Squared error of each row of `numbers` after `quantize`."""
    return ((quantize(numbers, layout).dequantize(torch.float32) - numbers).double() ** 2).sum(-1)


def from_extremes(numbers: Tensor) -> Tensor:
    """Squared error of each row with a step of a fifteenth of its range."""
    least, greatest = numbers.amin(-1, keepdim=True).clamp(max=0), numbers.amax(-1, keepdim=True).clamp(min=0)
    step = (greatest - least) / 15
    zero = (-least / step).round()
    return (((numbers / step + zero).round().clamp(0, 15) - zero) * step - numbers).double().square().sum(-1)


def from_largest(numbers: Tensor, most: int) -> Tensor:
    """Squared error of each row with a step of its largest number over `most`, and no zero point."""
    step = numbers.abs().amax(-1, keepdim=True) / most
    return ((numbers / step).round() * step - numbers).double().square().sum(-1)


def samples(kind: str, size: int) -> Tensor:
    torch.manual_seed(0)
    if kind == "trained":
        [file] = (load_file(DEMO / "model-00001-of-00002.safetensors"),)
        return file["model.layers.0.mlp.down_proj.weight"].float().view(-1, size)[:GROUPS]
    if kind == "heavy tails":
        return torch.distributions.StudentT(3.0).sample((GROUPS, size))
    return torch.randn(GROUPS, size) + (1.0 if kind == "off centre" else 0.0)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "off centre", "trained"])
@pytest.mark.parametrize(("size", "share"), [(128, 1.006), (32, 1.035)])
def test_4_bits_are_near_the_optimum(kind: str, size: int, share: float) -> None:
    numbers = samples(kind, size)
    found = errors(numbers, Layout(4, size, zeros=True))
    best = torch.tensor([least_error(row) for row in numbers])
    assert bool((found >= best * (1 - 1e-6)).all())
    assert found.sum() <= share * best.sum()
    assert found.sum() < 0.97 * from_extremes(numbers).sum()
    assert found.sum() < 0.8 * from_largest(numbers, 7).sum()


@pytest.mark.parametrize(("kind", "share"), [("normal", 0.999), ("heavy tails", 0.985)])
def test_8_bits_are_better_than_the_largest_number_as_127(kind: str, share: float) -> None:
    numbers = samples(kind, 4096)
    found = errors(numbers, Layout(8, 4096, zeros=False))
    simple = from_largest(numbers, 127)
    assert bool((found <= simple * 1.001).all())
    assert found.sum() < share * simple.sum()


numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=16) | st.just(0.0)


@settings(max_examples=200)
@given(
    st.lists(numbers, min_size=1, max_size=12),
    st.integers(0, 999),
    st.sampled_from([Layout(4, 32, True), Layout(4, 64, True), Layout(8, 64, False)]),
)
def test_no_worse_than_the_extremes_whatever_the_numbers(some: list[float], seed: int, layout: Layout) -> None:
    places = torch.randint(len(some), (3, 64), generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor(some)[places]
    held = quantize(rows, layout)
    groups = rows.view(-1, layout.group_size)
    found = (held.dequantize(torch.float32).view(groups.shape) - groups).double().square().sum(-1)
    if layout.bits == 8:
        assert int(held.values.min()) >= -127
        simple = from_largest(groups, 127)
    else:
        assert held.zeros is not None
        assert int(held.zeros.max()) <= 15
        simple = from_extremes(groups)
    usable = torch.isfinite(simple)  # the simple rules divide by zero where all numbers are zeros
    rounded_scale = groups.double().square().sum(-1) * 2.0**-22  # to 11 bits
    assert bool((found <= simple * 1.001 + rounded_scale + 1e-30)[usable].all())
    assert bool((found[groups.abs().amax(-1) == 0] == 0).all())


def test_threads_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    numbers, layout = torch.randn(301, 256).bfloat16(), Layout(4, 64, zeros=True)
    whole, threads = quantize(numbers, layout), torch.get_num_threads()
    monkeypatch.setattr(module, "_BLOCK", 1 << 11)
    torch.set_num_threads(3)
    try:
        again = quantize(numbers, layout)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for field in ("values", "scales", "zeros"):
        assert torch.equal(getattr(whole, field), getattr(again, field))


def test_scales_of_4_bits_fit_16() -> None:
    numbers = torch.randn(64, 256) * 0.02
    scales = quantize(numbers, Layout(4, 128, zeros=True)).scales
    assert torch.equal(scales, scales.half().float())
    tiny = quantize(numbers * 1e-6, Layout(4, 128, zeros=True))  # beyond float16, so they are kept in 32
    torch.testing.assert_close(tiny.scales, scales * 1e-6, rtol=1e-3, atol=0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("layout", [Layout(4, 64, zeros=True), Layout(8, 64, zeros=False)])
def test_numbers_that_are_not_finite(number: float, layout: Layout) -> None:
    numbers = torch.full((70, 64), number)
    numbers[:, ::2] = 1.0
    with pytest.raises(ValueError, match="not finite"):
        quantize(numbers, layout)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=64))
def test_nibbles(integers: list[int]) -> None:
    row = torch.tensor([integers[: len(integers) // 2 * 2]], dtype=torch.uint8)
    packed = pack_nibbles(row)
    assert packed.tolist() == [[low + 16 * high for low, high in zip(*[iter(row[0].tolist())] * 2, strict=True)]]
    assert torch.equal(unpack_nibbles(packed), row)
