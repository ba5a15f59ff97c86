"""The readable arithmetic on quantised weights against its definition, number by number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm4.ops.quantized import (
    QuantizedLinear,
    QuantizedWeight,
    dynamic_quantized_linear,
    quantize_activations,
    quantized_linear,
)


@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    asymmetric=st.booleans(),
    seed=st.integers(0, 9),
)
def test_dequantize_is_scale_times_distance_from_zero(
    bits: int, rows: int, groups: int, asymmetric: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = groups * 32
    q = torch.randint(0, 16, (rows, inputs), generator=generator) + (0 if bits == 4 else -8)
    values = (q[:, 0::2] + 16 * q[:, 1::2]).to(torch.uint8) if bits == 4 else q.to(torch.int8)
    scales = torch.rand(rows, groups, generator=generator)
    zeros = torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(bits, 32, values, scales, zeros if asymmetric and bits == 4 else None)
    assert (weight.out_features, weight.in_features) == (rows, inputs)
    whole = weight.dequantize(torch.float32)
    for o in range(rows):
        for i in range(inputs):
            zero = 0 if bits == 8 else int(zeros[o, i // 32]) if asymmetric else 8
            assert whole[o, i] == scales[o, i // 32] * (int(q[o, i]) - zero)


def test_activations_are_off_by_half_a_step_at_most() -> None:
    x = (
        torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-20, 1.0, 7.0, 1e20, 0.0])[:, None]
    )
    values, scale = quantize_activations(x)
    assert values.dtype is torch.int8 and values.abs().amax(1).tolist() == [127, 127, 127, 127, 0]
    assert ((values * scale - x).abs() <= 0.50001 * scale).all()


def test_activations_that_are_a_part_of_a_larger_whole() -> None:
    """Both halves are rounded as the whole is, also where the other one holds NaN or infinity."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    x[1, 3], x[2, 60], x[3] = torch.nan, -torch.inf, 0.0
    largest = x.abs().amax(1)
    values, scale = quantize_activations(x)
    for half in (slice(0, 32), slice(32, 64)):
        part_values, part_scale = quantize_activations(x[:, half], largest)
        assert torch.equal(part_values, values[:, half])
        assert torch.equal(part_scale.nan_to_num(-1.0), scale.nan_to_num(-1.0))
    assert scale[1:3].isnan().all()
    assert torch.equal(quantize_activations(x[4:], torch.zeros(2))[1], scale[4:])


def test_both_references_agree_when_rounding_loses_nothing() -> None:
    """Whole numbers of which one is 127 are their own 8-bit form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (4, 64), generator=generator).float()
    x[:, 0] = 127
    values = torch.randint(-128, 128, (6, 64), generator=generator, dtype=torch.int8)
    weight = QuantizedWeight(8, 64, values, torch.full((6, 1), 0.5))
    bias = torch.arange(6.0)
    exact = x @ (values.float() * 0.5).t() + bias
    assert torch.equal(quantized_linear(x, weight, bias), exact)
    assert torch.equal(QuantizedLinear(weight, bias)(x), exact)
    torch.testing.assert_close(dynamic_quantized_linear(x, weight, bias), exact)


@pytest.mark.parametrize(
    ("bits", "group_size", "values", "scales", "zeros"),
    [
        (4, 32, torch.zeros(2, 16, dtype=torch.int8), torch.zeros(2, 1), None),
        (8, 32, torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1), None),
        (5, 32, torch.zeros(2, 20, dtype=torch.uint8), torch.zeros(2, 1), None),
        (4, 48, torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1), None),
        (4, 32, torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 2), None),
        (4, 32, torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 1).half(), None),
        (4, 32, torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 1), torch.zeros(2, 1)),
        (8, 32, torch.zeros(2, 32, dtype=torch.int8), torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.uint8)),
    ],
)
def test_parts_that_do_not_go_together_are_refused(bits, group_size, values, scales, zeros) -> None:
    with pytest.raises(ValueError, match=f"{bits}-bit values"):
        QuantizedWeight(bits, group_size, values, scales, zeros)
