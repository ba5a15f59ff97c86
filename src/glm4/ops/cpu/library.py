"""The native kernels: found beside this file, checked, and told which instruction set to use."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from glm4.errors import OptionError

ABI_VERSION = 3
ISA_VARIABLE = "GLM4_CPU_ISA"
LIBRARY_VARIABLE = "GLM4_CPU_LIBRARY"
"""Names a library to load instead of the installed one: another build, such as csrc/sanitize.sh makes."""
ISAS = ("plain", "avx2", "avx512vnni", "avx512bf16")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The number formats of activations, as the kernels count them."""

_MODULE = "glm4.ops.cpu._kernels"


class WeightStruct(ctypes.Structure):
    """Glm4Weight of csrc/glm4_cpu.h."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("half_scales", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


_WEIGHT = ctypes.POINTER(WeightStruct)


class AttentionStruct(ctypes.Structure):
    """Glm4Attention of csrc/glm4_cpu.h."""

    _fields_ = [
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("k_cache", ctypes.c_void_p),
        ("v_cache", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("kv_stride", ctypes.c_int64),
        ("cache_format", ctypes.c_int64),
        ("k_scales", ctypes.c_void_p),
        ("v_scales", ctypes.c_void_p),
        ("requests", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("spans", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
    ]


class NormStruct(ctypes.Structure):
    """Glm4Norm of csrc/glm4_cpu.h."""

    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("residual", ctypes.c_void_p),
        ("branch", ctypes.c_void_p),
        ("branch_weight", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


class SwigluStruct(ctypes.Structure):
    """Glm4Swiglu of csrc/glm4_cpu.h."""

    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("gate_up_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("gate_up", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


class KvWriteStruct(ctypes.Structure):
    """Glm4KvWrite of csrc/glm4_cpu.h."""

    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("rotary_dim", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("k_cache", ctypes.c_void_p),
        ("v_cache", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("kv_stride", ctypes.c_int64),
        ("cache_format", ctypes.c_int64),
        ("k_scales", ctypes.c_void_p),
        ("v_scales", ctypes.c_void_p),
    ]


class BlockStruct(ctypes.Structure):
    """Glm4Block of csrc/glm4_cpu.h."""

    _fields_ = [
        *((name, _WEIGHT) for name in ("q", "k", "v", "o", "gate_up", "down")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "post_self_attn_norm", "post_attention_norm", "post_mlp_norm", "next_norm",
                "k_cache", "v_cache", "k_scales", "v_scales",
            )
        ),
    ]  # fmt: skip


class StepStruct(ctypes.Structure):
    """Glm4Step of csrc/glm4_cpu.h."""

    _fields_ = [
        ("write", KvWriteStruct),
        ("attention", AttentionStruct),
        *((name, ctypes.c_void_p) for name in ("hidden", "normed", "branch", "gate_up", "gated")),
        ("eps", ctypes.c_float),
    ]


class ArgmaxStruct(ctypes.Structure):
    """Glm4Argmax of csrc/glm4_cpu.h."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("known", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("picked", ctypes.c_void_p),
    ]


_POINTER, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "glm4_abi_version": (_INT, []),
    "glm4_select_isa": (ctypes.c_char_p, [ctypes.c_char_p]),
    "glm4_set_threads": (None, [_INT]),
    "glm4_threads": (_INT, []),
    "glm4_allocate": (_POINTER, [ctypes.c_size_t]),
    "glm4_free": (None, [_POINTER, ctypes.c_size_t]),
    "glm4_memory_nodes": (_INT, []),
    "glm4_spread": (_INT, [_POINTER, ctypes.c_size_t]),
    "glm4_map_in": (None, [_POINTER, ctypes.c_size_t]),
    "glm4_weight_sizes": (None, [_WEIGHT, ctypes.POINTER(_I64)]),
    "glm4_pack_rows": (None, [_WEIGHT, _I64, _I64, _POINTER, _POINTER, _POINTER]),
    "glm4_linear": (None, [_WEIGHT, _POINTER, _I64, _I64, _INT, _POINTER, _POINTER, _I64]),
    "glm4_linear_bf16": (None, [_POINTER, _I64, _I64, _I64, _POINTER, _POINTER, _I64, _I64, _POINTER, _I64]),
    "glm4_attention": (_INT, [ctypes.POINTER(AttentionStruct)]),
    "glm4_norm": (None, [ctypes.POINTER(NormStruct)]),
    "glm4_swiglu": (None, [ctypes.POINTER(SwigluStruct)]),
    "glm4_rotate_and_store": (_INT, [ctypes.POINTER(KvWriteStruct)]),
    "glm4_block": (_INT, [ctypes.POINTER(BlockStruct), ctypes.POINTER(StepStruct)]),
    "glm4_argmax": (None, [ctypes.POINTER(ArgmaxStruct)]),
    "glm4_group_bytes": (_I64, [_INT]),
    "glm4_group_open": (_POINTER, [_INT, _INT, _INT]),
    "glm4_group_close": (None, [_POINTER]),
    "glm4_group_missing": (ctypes.c_uint64, [_POINTER]),
    "glm4_all_reduce": (_INT, [_POINTER, _POINTER, _I64, _INT, _I64]),
    "glm4_gather": (_INT, [_POINTER, _POINTER, _I64, _I64, _POINTER, _I64]),
    "glm4_read_stream": (ctypes.c_uint64, [_POINTER, ctypes.c_size_t]),
    "glm4_multiply": (_I64, [_I64]),
}


def _find() -> str | None:
    """Where the library is. Python's own finder knows editable installs too, which keep it apart from the sources."""
    spec = importlib.util.find_spec(_MODULE)
    return os.environ.get(LIBRARY_VARIABLE) or (spec.origin if spec else None)


@lru_cache(maxsize=1)
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, and the instruction set it runs with; or None, and why there is none.

    Raises OptionError when GLM4_CPU_ISA names an instruction set that is unknown or that this CPU lacks.
    """
    wanted = os.environ.get(ISA_VARIABLE) or None
    if wanted is not None and wanted not in ISAS:
        raise OptionError(f"{ISA_VARIABLE}: {wanted!r} is none of {', '.join(ISAS)}")
    path = _find()
    if path is None:
        return None, "the native kernels were not built (they need a C++ compiler while installing)"
    try:
        library = ctypes.CDLL(path)
        version = library.glm4_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the native kernels cannot be loaded: {error}"
    if version != ABI_VERSION:
        return None, f"the native kernels are of version {version}, not {ABI_VERSION}: install the package again"
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    chosen = library.glm4_select_isa(None if wanted is None else wanted.encode())
    if chosen is None:
        raise OptionError(f"{ISA_VARIABLE}: this CPU lacks {wanted}; leave it out to use the best there is")
    return library, chosen.decode()


def load() -> ctypes.CDLL | None:
    """The library of native kernels, or None where there is none; OptionError for a wrong GLM4_CPU_ISA."""
    return _open()[0]


def computes(x: Tensor) -> bool:
    """Whether the kernels run on what begins with x: there are some, and x is theirs by device and number format."""
    return x.device.type == "cpu" and x.dtype in DTYPES and load() is not None


def need() -> ctypes.CDLL:
    """The library; RuntimeError, with the reason, where there is none."""
    library, reason = _open()
    if library is None:
        raise RuntimeError(reason)
    return library


def kernels_summary() -> str:
    """One line for people: which kernels run on the CPU, and why."""
    library, text = _open()
    if library is None:
        return f"PyTorch: {text}"
    forced = f", forced by {ISA_VARIABLE}" if os.environ.get(ISA_VARIABLE) else ""
    threads = library.glm4_threads()
    return f"native, {text}{forced}, {threads} thread{'' if threads == 1 else 's'}"


def select_isa(name: str | None) -> bool:
    """Run the kernels of one instruction set of ISAS from now on, None: the best; whether this CPU has it."""
    return need().glm4_select_isa(None if name is None else name.encode()) is not None


def set_threads(threads: int) -> None:
    """How many threads the kernels use, the caller included; nothing where there is no library."""
    library = load()
    if library is not None:
        library.glm4_set_threads(threads)
