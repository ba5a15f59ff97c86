"""In how many bits each weight is held, from names and shapes alone: the memory plan needs no tensor library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

GROUP_SIZES = (128, 64, 32)
"""Inputs that may share a scale of 4-bit weights, the smallest folder first."""

HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """How one weight matrix [out_features, in_features] is held: the shape of a QuantizedWeight."""

    bits: int
    """4 or 8."""
    group_size: int
    """Inputs that share a scale; in_features for one scale a row."""
    zeros: bool
    """Whether each group has a zero point of its own."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight [out_features, in_features]: values, float32 scales and 8-bit zero points."""
        rows, inputs = shape
        return rows * (inputs * self.bits // 8 + inputs // self.group_size * (5 if self.zeros else 4))


def is_linear(name: str) -> bool:
    """Whether `name` is the weight of a matrix product; norms, biases and the embedding stay as they are."""
    return name.endswith("_proj.weight") or name == HEAD


def chosen_layout(name: str, shape: tuple[int, ...], quantization: str, group_size: int) -> Layout | None:
    """How `quantization` (none, int8 or int4) holds the weight `name`; None: in the number format of the arithmetic.

    int8 has one scale a row. int4 has groups of `group_size` or, where they do not divide the inputs, the next smaller
    ones that do; it leaves the output head, to which words are most sensitive, and rows that no group divides in int8.
    """
    if quantization == "none" or not is_linear(name):
        return None
    inputs = shape[1]
    if quantization == "int4" and name != HEAD:
        for size in GROUP_SIZES:
            if size <= group_size and inputs % size == 0:
                return Layout(4, size, zeros=True)
    return Layout(8, inputs, zeros=False)


def chosen_layouts(
    shapes: Mapping[str, tuple[int, ...]], quantization: str, group_size: int = GROUP_SIZES[0]
) -> dict[str, Layout]:
    """`chosen_layout` of every weight that has one."""
    found = {name: chosen_layout(name, shape, quantization, group_size) for name, shape in shapes.items()}
    return {name: layout for name, layout in found.items() if layout is not None}


def stored_layout(bits: int, group_size: int, inputs: int, symmetric: bool) -> Layout | None:
    """How whole numbers of `bits` that others wrote are held without changing them; None: they must be dequantised.

    Groups above 128 become several with the same scale. 8 bits are kept where one scale a row is all there is.
    """
    if inputs % group_size:
        return None
    if bits == 8:
        return Layout(8, inputs, zeros=False) if symmetric and group_size == inputs else None
    sizes = [size for size in GROUP_SIZES if group_size % size == 0]
    return Layout(4, sizes[0], zeros=not symmetric) if sizes else None


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a weight that a rank holds: rows (axis 0) or columns (axis 1), in ranges that follow one another."""

    axis: int
    ranges: tuple[tuple[int, int], ...]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's."""
        size = sum(end - first for first, end in self.ranges)
        return (*whole[: self.axis], size, *whole[self.axis + 1 :])

    def group_size(self, whole: int, inputs: int) -> int:
        """Columns of the part that share a scale, where groups of `whole` of the `inputs` columns did.

        One scale a row is one for any part of it; groups that are cut in two become smaller ones with the same scale.
        """
        if self.axis == 0:
            return whole
        [(first, end)] = self.ranges
        return end - first if whole == inputs else gcd(whole, first, end)

    def on_boundaries(self, group_size: int) -> bool:
        """No group of columns is cut in two."""
        return self.axis == 0 or all(place % group_size == 0 for ends in self.ranges for place in ends)

    def one_by_one(self) -> list[Cut]:
        """Its ranges, each alone."""
        return [Cut(self.axis, (each,)) for each in self.ranges]
