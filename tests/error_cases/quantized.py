"""Rounding weights, and folders whose weights are rounded."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from error_cases.table import case
from programs import Bench, Ran
from safetensors.torch import load_file, save_file
from torch import Tensor


def quantize(bench: Bench, target: str = "other") -> Ran:
    """`glm4 quantize` of the model."""
    return bench.glm4("quantize", str(bench.model), target)


def packed(bench: Bench) -> Bench:
    """The bench with a packed folder `other` for its model."""
    assert quantize(bench).code == 0
    bench.model = Path("other")
    return bench


@case("`--quantization int5`")
def _(bench: Bench) -> Ran:
    return bench.generate("--quantization", "int5")


@case("`--quantization int8` for a folder in 4 bits")
def _(bench: Bench) -> Ran:
    return packed(bench).generate("--quantization", "int8")


@case("a weight that is not a number, and `--quantization`")
def _(bench: Bench) -> Ran:
    def damage(tensors: dict[str, Tensor]) -> None:
        next(tensor for name, tensor in tensors.items() if name.endswith("_proj.weight"))[0, 0] = torch.nan

    bench.edit_shard(damage)
    return bench.generate("--quantization", "int4")


@case("a weight of a quantised folder is missing")
def _(bench: Bench) -> Ran:
    file = packed(bench).model / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight.scales"]
    save_file(tensors, file)
    return bench.both()


@case("`glm4 quantize` of a folder that is quantised")
def _(bench: Bench) -> Ran:
    return quantize(packed(bench), "another")


@case("`glm4 quantize` into a folder that holds something")
def _(bench: Bench) -> Ran:
    Path("other").mkdir()
    Path("other/thesis.tex").touch()
    return quantize(bench)


@case("`glm4 quantize` where a run was killed")
def _(bench: Bench) -> Ran:
    Path("other.incomplete").mkdir()
    return quantize(bench)


@case("`glm4 quantize` where nothing can be written")
def _(bench: Bench) -> Ran:
    return quantize(bench, "/proc/other")


@case("`glm4 quantize` to a disk that is too small")
def _(bench: Bench) -> Ran:
    usage = shutil.disk_usage(".")._replace(free=1000)
    bench.monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return quantize(bench)


@case("`glm4 verify` of a quantised folder alone")
def _(bench: Bench) -> Ran:
    packed(bench)
    return bench.glm4("verify", "other")


@case("`glm4 verify` against a quantised folder")
def _(bench: Bench) -> Ran:
    packed(bench)
    return bench.glm4("verify", "model", "--against", "other")
