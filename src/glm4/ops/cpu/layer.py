"""What lies between a block's matrix products, in one pass each; rounded as the readable operations round."""

from __future__ import annotations

import torch
from torch import Tensor

from glm4.ops.cpu.library import DTYPES, ArgmaxStruct, NormStruct, SwigluStruct, need


def add_norm(
    residual: Tensor,
    branch: Tensor | None,
    branch_weight: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """hidden = residual + rms_norm(branch, branch_weight); out = rms_norm(hidden, weight).

    residual, branch: [tokens, size]; branch_weight, weight: [size]; all float32 or all bfloat16 → (hidden, out).
    Without a branch hidden is residual itself; without a weight out is hidden.
    Raises ValueError where shapes or number formats differ.
    """
    tensors = [x for x in (residual, branch) if x is not None]
    weights = [x for x in (branch_weight, weight) if x is not None]
    fits = (
        residual.dtype in DTYPES
        and all(x.dtype is residual.dtype for x in (*tensors, *weights))
        and all(x.shape == residual.shape and x.dim() == 2 for x in tensors)
        and all(x.shape == residual.shape[1:] for x in weights)
        and (branch is None) == (branch_weight is None)
    )
    if not fits:
        raise ValueError("residual, branch and their weights must be of one size and one of float32 and bfloat16")
    # Copies made here must outlive the call: the kernel gets addresses only.
    residual, branch = residual.contiguous(), None if branch is None else branch.contiguous()
    branch_weight = None if branch_weight is None else branch_weight.contiguous()
    weight = None if weight is None else weight.contiguous()
    hidden = residual if branch is None else torch.empty_like(residual)
    out = hidden if weight is None else torch.empty_like(residual)
    need().glm4_norm(
        NormStruct(
            tokens=residual.shape[0],
            size=residual.shape[1],
            dtype=DTYPES[residual.dtype],
            eps=eps,
            residual=residual.data_ptr(),
            branch=None if branch is None else branch.data_ptr(),
            branch_weight=None if branch_weight is None else branch_weight.data_ptr(),
            weight=None if weight is None else weight.data_ptr(),
            hidden=hidden.data_ptr(),
            out=None if weight is None else out.data_ptr(),
        )
    )
    return hidden, out


def swiglu(gate_up: Tensor) -> Tensor:
    """up · silu(gate); gate_up: float32 or bfloat16 [tokens, 2·size], the gate's half first → [tokens, size]."""
    tokens, both = gate_up.shape
    if gate_up.dtype not in DTYPES or both % 2:
        raise ValueError(f"no gate and up in {gate_up.dtype} {list(gate_up.shape)}")
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    out = torch.empty(tokens, both // 2, dtype=gate_up.dtype)
    need().glm4_swiglu(
        SwigluStruct(
            tokens=tokens,
            size=both // 2,
            gate_up_stride=gate_up.stride(0),
            dtype=DTYPES[gate_up.dtype],
            gate_up=gate_up.data_ptr(),
            out=out.data_ptr(),
        )
    )
    return out


def argmax(logits: Tensor, known: int) -> list[int]:
    """The first of the largest among the first `known` of each row; -1 for a row that is not finite anywhere.

    logits: float32 or bfloat16 [rows, size], 0 < known <= size.
    """
    (rows, size), picked = logits.shape, torch.empty(len(logits), dtype=torch.int64)
    if logits.dtype not in DTYPES or not 0 < known <= size:
        raise ValueError(f"no likeliest of {known} in {logits.dtype} {list(logits.shape)}")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    need().glm4_argmax(
        ArgmaxStruct(
            rows=rows,
            size=size,
            known=known,
            stride=logits.stride(0),
            dtype=DTYPES[logits.dtype],
            logits=logits.data_ptr(),
            picked=picked.data_ptr(),
        )
    )
    return picked.tolist()
