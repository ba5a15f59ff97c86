"""Folders in others' formats, byte for byte as their descriptions say, are read as the numbers that went in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
import torch
from packers import Integers, write_folder
from safetensors.torch import load_file, save_file
from tiny import edit_json
from torch import Tensor

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.errors import CheckpointError, ConfigError, OptionError
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.utils import shapes_of
from glm4.ops.quantized import QuantizedWeight
from glm4.quantization.quantize import quantize
from glm4.quantization.weights import Weights, expected_layouts, read_format

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(stored_as: str, activations: Any = None, **weights: Any) -> dict[str, Any]:
    """A config of compressed-tensors with one scheme."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": activations}}
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "config_groups": groups,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def open_weights(folder: Path, quantization: str = "none") -> Weights:
    opened = ModelFolder.open(folder)
    config = Glm4Config.from_dict(opened.read_json("config.json"))
    return Weights(Checkpoint.open(opened), shapes_of(config), quantization)


def check(folder: Path, expected: dict[str, Tensor], held: tuple[int, int] | None) -> None:
    """All weights are read as `expected`; those of layers are held in (bits, group size), or None: in bfloat16."""
    weights = open_weights(folder)
    weights.check()
    for name, numbers in expected.items():
        read = weights.read(name)
        if not name.endswith("_proj.weight"):
            assert isinstance(read, Tensor)
            assert torch.equal(read, numbers)
        elif held is None:
            assert isinstance(read, Tensor)
            assert torch.equal(read, numbers.bfloat16())
            assert name not in weights.layouts
        else:
            assert isinstance(read, QuantizedWeight)
            assert (read.bits, read.group_size) == (held[0], held[1] or read.in_features)
            assert torch.equal(read.dequantize(torch.float32), numbers)
            layout = weights.layouts[name]
            assert (layout.bits, layout.group_size, layout.zeros) == (
                read.bits,
                read.group_size,
                read.zeros is not None,
            )
            parts = [read.values, read.scales] + ([] if read.zeros is None else [read.zeros])
            assert layout.nbytes(tuple(numbers.shape)) == sum(part.nbytes for part in parts)
    config = packers.read_config(folder)
    shapes = {name: tuple(numbers.shape) for name, numbers in expected.items()}
    assert expected_layouts(read_format(config, folder), shapes, "none") == weights.layouts


def integers(bits: int, group_size: int, least_zero: int | None) -> Callable[[tuple[int, int]], Integers]:
    rng = np.random.default_rng(0)
    return lambda shape: Integers.random(rng, shape, bits, min(group_size, shape[1]), least_zero)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_gptq_4_bits(tmp_path: Path, version: int, symmetric: bool, group_size: int) -> None:
    draw = integers(4, group_size if group_size > 0 else 10**6, None if symmetric else version % 2)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        weight = draw(shape)
        return packers.gptq(weight, version), weight.numbers()

    settings = GPTQ | {"sym": symmetric, "group_size": group_size}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    expected = write_folder(tmp_path, settings, pack)
    if group_size == -1:  # one scale a row, held as groups that share it
        weights = open_weights(tmp_path)
        for name, numbers in expected.items():
            if name.endswith("_proj.weight"):
                read = weights.read(name)
                assert isinstance(read, QuantizedWeight)
                assert read.group_size == {64: 64, 128: 128}[numbers.shape[1]]
                assert torch.equal(read.dequantize(torch.float32), numbers)
    else:
        check(tmp_path, expected, (4, group_size))


def test_gptq_first_version_with_zero_points_of_zero(tmp_path: Path) -> None:
    """Writers subtract 1 from every field of whole words, so that 0 borrows from its neighbour."""
    draw = integers(4, 32, 0)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        weight = draw(shape)
        weight.zeros[::3] = 0
        return packers.gptq(weight, 1, minus_one_of_words=True), weight.numbers()

    check(tmp_path, write_folder(tmp_path, GPTQ | {"sym": False}, pack), (4, 32))


@pytest.mark.parametrize("group_size", [48, 16, 256])
def test_groups_that_do_not_fit_are_dequantised(tmp_path: Path, group_size: int) -> None:
    rng = np.random.default_rng(0)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        weight = Integers.random(rng, (shape[0], -(-shape[1] // group_size) * group_size), 4, group_size, 0)
        weight.values, weight.group_of = weight.values[:, : shape[1]], weight.group_of[: shape[1]]
        return packers.gptq(weight, 2), weight.numbers()

    settings = GPTQ | {"sym": False, "group_size": group_size, "checkpoint_format": "gptq_v2"}
    check(tmp_path, write_folder(tmp_path, settings, pack), None)


@pytest.mark.parametrize(("group_size", "held"), [(-1, (8, 0)), (32, None)])
def test_gptq_8_bits(tmp_path: Path, group_size: int, held: tuple[int, int] | None) -> None:
    draw = integers(8, group_size if group_size > 0 else 10**6, None)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        weight = draw(shape)
        return packers.gptq(weight), weight.numbers()

    check(tmp_path, write_folder(tmp_path, GPTQ | {"bits": 8, "group_size": group_size}, pack), held)


def test_gptq_with_inputs_in_an_order_of_their_own(tmp_path: Path) -> None:
    draw, rng = integers(4, 32, 1), np.random.default_rng(1)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        weight = draw(shape)
        rng.shuffle(weight.group_of)
        return packers.gptq(weight), weight.numbers()

    settings = GPTQ | {"desc_act": True, "sym": False}
    expected = write_folder(tmp_path, settings, pack)
    check(tmp_path, expected, None)
    edit_json(tmp_path / "config.json", quantization_config=settings | {"desc_act": False})
    with pytest.raises(CheckpointError, match=r"q_proj.weight' has its inputs in an order of their own \(g_idx\)"):
        open_weights(tmp_path).read("model.layers.0.self_attn.q_proj.weight")


def test_awq(tmp_path: Path) -> None:
    draw = integers(4, 32, 0)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        weight = draw(shape)
        return packers.awq(weight), weight.numbers()

    check(tmp_path, write_folder(tmp_path, AWQ, pack), (4, 32))


@pytest.mark.parametrize(
    ("bits", "strategy", "symmetric", "held"),
    [
        (4, "group", True, (4, 32)),
        (4, "group", False, (4, 32)),
        (8, "channel", True, (8, 0)),
        (8, "channel", False, None),
        (8, "group", True, None),
    ],
)
def test_pack_quantized(
    tmp_path: Path, bits: int, strategy: str, symmetric: bool, held: tuple[int, int] | None
) -> None:
    draw = integers(bits, 32 if strategy == "group" else 10**6, None if symmetric else 0)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        weight = draw(shape)
        weight.scales = torch.from_numpy(weight.scales).bfloat16().float().numpy()
        parts = packers.pack_quantized(weight)
        if symmetric:
            del parts["weight_zero_point"]
        return parts, weight.numbers()

    settings = compressed(
        "pack-quantized", num_bits=bits, strategy=strategy, symmetric=symmetric,
        group_size=32 if strategy == "group" else None,
    )  # fmt: skip
    check(tmp_path, write_folder(tmp_path, settings, pack), held)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int_quantized(tmp_path: Path, strategy: str) -> None:
    rng = torch.Generator().manual_seed(0)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        values = torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)
        scale = torch.rand((shape[0], 1) if strategy == "channel" else (1,), generator=rng) / 100
        return {"weight": values, "weight_scale": scale}, values.float() * scale

    settings = compressed(
        "int-quantized", {"num_bits": 8, "dynamic": True}, num_bits=8, strategy=strategy, group_size=None
    )
    check(tmp_path, write_folder(tmp_path, settings, pack), (8, 0))


@pytest.mark.parametrize(
    ("settings", "scale_name", "scale_shape"),
    [
        ({"quant_method": "fp8", "weight_block_size": [48, 32]}, "weight_scale_inv", "blocks"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", "one"),
        (compressed("float-quantized", num_bits=8, type="float", strategy="tensor"), "weight_scale", "one"),
        (compressed("float-quantized", num_bits=8, type="float", strategy="channel"), "weight_scale", "rows"),
        (
            compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[48, 32]),
            "weight_scale",
            "blocks",
        ),
        (compressed("naive-quantized", num_bits=8, type="float", strategy="channel"), "weight_scale", "rows"),
    ],
)
def test_8_bit_floats(tmp_path: Path, settings: dict[str, Any], scale_name: str, scale_shape: str) -> None:
    rng = torch.Generator().manual_seed(0)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        values = (torch.randn(shape, generator=rng) * 100).to(torch.float8_e4m3fn)
        rows = {"one": shape[0], "rows": 1, "blocks": 48}[scale_shape]
        columns = {"one": shape[1], "rows": shape[1], "blocks": 32}[scale_shape]
        table = torch.rand(-(-shape[0] // rows), -(-shape[1] // columns), generator=rng) / 1000
        wide = table.repeat_interleave(rows, dim=0)[: shape[0]].repeat_interleave(columns, dim=1)[:, : shape[1]]
        numbers = values.float() * wide
        parts = {"weight": values, scale_name: table[0, 0] if scale_shape == "one" else table}
        if settings.get("activation_scheme") == "static":
            parts["input_scale"] = torch.ones(1)
        return parts, numbers

    check(tmp_path, write_folder(tmp_path, settings, pack), None)


def test_what_is_dequantised_can_be_quantised_again(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        values = (torch.randn(shape, generator=rng) * 100).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": torch.tensor(0.01)}, values.float() * 0.01

    expected = write_folder(tmp_path, {"quant_method": "fp8"}, pack)
    weights = open_weights(tmp_path, "int4")
    weights.check()
    name = "model.layers.0.mlp.down_proj.weight"
    read, rounded = weights.read(name), quantize(expected[name].bfloat16(), weights.layouts[name])
    assert isinstance(read, QuantizedWeight)
    assert torch.equal(read.dequantize(torch.float32), rounded.dequantize(torch.float32))


def some_gptq(folder: Path) -> dict[str, Tensor]:
    """A sound folder; what its weights are."""
    draw = integers(4, 32, None)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        weight = draw(shape)
        return packers.gptq(weight), weight.numbers()

    return write_folder(folder, GPTQ, pack)


def test_a_layer_that_was_left_out_is_read_as_it_is(tmp_path: Path) -> None:
    some_gptq(tmp_path)
    prefix = "model.layers.1.mlp.down_proj."
    tensors = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if not n.startswith(prefix)}
    plain = torch.randn(64, 128).bfloat16()
    save_file(tensors | {prefix + "weight": plain}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    weights.check()
    read = weights.read(prefix + "weight")
    assert isinstance(read, Tensor)
    assert torch.equal(read, plain)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("qzeros"), "has no tensor 'model.layers.0.self_attn.q_proj.qzeros'"),
        (lambda t: t.update(qzeros=t["qzeros"][:1].clone()), "q_proj.qzeros' has shape [1, 8]"),
        (lambda t: t.update(scales=t["scales"].double()), "q_proj.scales' is F64"),
        (lambda t: t.update(qweight=t["qweight"].float()), "q_proj.qweight' is F32"),
    ],
)
def test_a_damaged_part_is_named(tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], words: str) -> None:
    some_gptq(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.0.self_attn.q_proj."
    layer = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    edit(layer)
    save_file(tensors | {prefix + end: part for end, part in layer.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path).check()
    assert words in str(caught.value)


def test_zero_points_off_the_middle_contradict_sym(tmp_path: Path) -> None:
    some_gptq(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.qzeros"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.weight' has zero points, although its settings call it"):
        open_weights(tmp_path).read("model.layers.0.self_attn.q_proj.weight")


def test_what_is_quantised_is_not_quantised_in_another_way(tmp_path: Path) -> None:
    expected = some_gptq(tmp_path)
    with pytest.raises(OptionError, match=r"quantization int8: .* already, to 4 bits \(gptq\): leave the option out"):
        open_weights(tmp_path, "int8")
    weights = open_weights(tmp_path, "int4")  # the head, which the folder leaves as it is
    head = weights.read("lm_head.weight")
    assert isinstance(head, QuantizedWeight)
    assert head.bits == 8
    layer = weights.read("model.layers.2.mlp.down_proj.weight")
    assert isinstance(layer, QuantizedWeight)
    assert torch.equal(layer.dequantize(torch.float32), expected["model.layers.2.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes, which this program does"),
        ([4], "quantization_config is [4], not an object"),
        ({"load_in_4bit": True}, "quantised by an unnamed method"),
        (GPTQ | {"bits": 3}, "bits 3 is not supported (supported: 4, 8)"),
        (GPTQ | {"bits": True}, "bits True is not supported"),
        (GPTQ | {"group_size": 0}, "group_size 0 is not a number of inputs"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic gives '+:.*down.*' settings of its own"),
        (AWQ | {"version": "gemv"}, "version 'gemv' is not supported (supported: gemm)"),
        (AWQ | {"zero_point": False}, "zero_point False is not supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size [128] is not [rows, columns]"),
        (compressed("marlin-24"), "format 'marlin-24' is not supported"),
        (compressed("nvfp4-pack-quantized", type="float"), "format 'nvfp4-pack-quantized' is not supported"),
        (compressed("pack-quantized", num_bits=2), "num_bits 2 is not supported"),
        (compressed("int-quantized", num_bits=8, type="float"), "type 'float' is not supported (supported: int)"),
        (compressed("pack-quantized") | {"config_groups": {}}, "0 ways to quantise weights"),
        (
            compressed("pack-quantized") | {"config_groups": {"group_0": {"weights": {"num_bits": "four"}}}},
            "num_bits 'four' is not supported",
        ),
        (
            compressed("pack-quantized") | {"config_groups": {str(n): {"weights": {"num_bits": n}} for n in (4, 8)}},
            "2 ways to quantise weights",
        ),
        (compressed("pack-quantized") | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not supported"),
        (compressed("pack-quantized") | {"transform_config": {"R1": {}}}, "transform_config is not supported"),
        ({"quant_method": "glm4", "format_version": 1}, "format_version 1 is not supported (supported: 2)"),
        ({"quant_method": "glm4", "format_version": True}, "format_version True is not supported (supported: 2)"),
    ],
)
def test_what_is_not_supported_is_named(settings: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_format({"quantization_config": settings}, Path("folder/config.json"))
    text = str(caught.value)
    assert words in text
    assert text.startswith("folder/config.json: ")
    assert "bfloat16 folder" in text or "original model folder" in text


def test_no_settings_no_format() -> None:
    assert read_format({"quantization_config": None}, Path("config.json")) is None
    assert read_format({}, Path("config.json")) is None


def test_older_name_of_the_settings_of_compressed_tensors(tmp_path: Path) -> None:
    settings = compressed("pack-quantized")
    del settings["quant_method"]
    found = read_format({"compression_config": settings}, tmp_path)
    assert found is not None
    assert found.method == "compressed-tensors"
