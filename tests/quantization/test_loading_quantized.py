"""Models quantised while loading: which weights are, what they compute, and in how much memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packers import SHAPE
from test_formats import some_gptq
from tiny import write_tiny
from torch import Tensor

from glm4.bench.ceilings import Work
from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.errors import CheckpointError, MemoryPlanError
from glm4.files import read_json
from glm4.model import loading
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.model.modeling_glm4 import Glm4ForCausalLM
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.model.utils import shapes_of
from glm4.ops.attention import make_batch
from glm4.ops.cpu.panels import PanelWeight
from glm4.ops.quantized import QuantizedLinear, QuantizedWeight
from glm4.options import EngineOptions
from glm4.plan import MemoryPlan
from glm4.quantization.layout import chosen_layouts
from glm4.quantization.packed_writer import write_packed
from glm4.quantization.weights import Weights

CPU = torch.device("cpu")


def opened(path: Path) -> tuple[Checkpoint, Glm4Config]:
    folder = ModelFolder.open(path)
    return Checkpoint.open(folder), Glm4Config.from_dict(folder.read_json("config.json"))


def dequantised(path: Path, quantization: str) -> dict[str, Tensor]:
    """All weights of the folder, in float32, as numbers."""
    checkpoint, config = opened(path)
    weights = Weights(checkpoint, shapes_of(config), quantization)
    read = {name: weights.read(name) for name in shapes_of(config)}
    return {
        name: weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.float()
        for name, weight in read.items()
    }


def logits(model: Glm4ForInference, ids: list[int]) -> Tensor:
    length = len(ids)
    batch = make_batch([(0, length)], [0], [list(range(length))], 1, CPU)
    with torch.inference_mode():
        cache = model.new_kv_cache(length, model.embed_tokens.dtype)
        return model.logits(model.forward(torch.tensor(ids), torch.arange(length), batch, cache))


@pytest.fixture
def plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The readable reference in place of kernels, which round activations too."""
    monkeypatch.setattr(loading, "make_quantized_linear", lambda weight, bias, arena: QuantizedLinear(weight, bias))


@pytest.mark.usefixtures("plain_layers")
@pytest.mark.parametrize("quantization", ["int8", "int4", "stored as gptq"])
def test_a_quantised_model_is_the_plain_model_on_its_dequantised_weights(tmp_path: Path, quantization: str) -> None:
    if quantization == "stored as gptq":
        some_gptq(tmp_path)
        quantization = "none"
    else:
        write_tiny(tmp_path, **SHAPE)
    checkpoint, config = opened(tmp_path)
    model = load_model(checkpoint, config, CPU, torch.float32, quantization=quantization)
    reference = Glm4ForCausalLM(config)
    reference.load_state_dict(dequantised(tmp_path, quantization))
    ids = list(range(5, 60))
    with torch.no_grad():
        theirs = reference(torch.tensor([ids]))[0]
    torch.testing.assert_close(logits(model, ids), theirs, rtol=0, atol=2e-4)
    as_it_was = logits(load_model(*opened(tmp_path), CPU, torch.float32), ids)
    assert (quantization == "none") == torch.equal(logits(model, ids), as_it_was)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_on_the_kernels_of_this_machine_it_is_about_the_same(tmp_path: Path, quantization: str) -> None:
    """Activations rounded to 8 bits a token change logits by far less than they differ from each other."""
    write_tiny(tmp_path, **SHAPE)
    model = load_model(*opened(tmp_path), CPU, torch.float32, quantization=quantization)
    reference = Glm4ForCausalLM(opened(tmp_path)[1])
    reference.load_state_dict(dequantised(tmp_path, quantization))
    ids = list(range(5, 60))
    with torch.no_grad():
        theirs = reference(torch.tensor([ids]))[0]
    assert torch.nn.functional.cosine_similarity(logits(model, ids), theirs).min() > 0.995


@pytest.mark.parametrize(("quantization", "bits"), [("int8", {8}), ("int4", {4, 8})])
def test_which_weights_are_quantised(tmp_path: Path, quantization: str, bits: set[int]) -> None:
    write_tiny(tmp_path)  # down_proj has 112 inputs, which no group divides: 8 bits
    checkpoint, config = opened(tmp_path)
    weights = Weights(checkpoint, shapes_of(config), quantization)
    read = {name: weights.read(name) for name in shapes_of(config)}
    held = {name: weight.bits for name, weight in read.items() if isinstance(weight, QuantizedWeight)}
    assert set(held) == {name for name in read if "_proj.weight" in name or name == "lm_head.weight"}
    assert held["lm_head.weight"] == held["model.layers.0.mlp.down_proj.weight"] == 8
    assert set(held.values()) == bits


def test_a_tied_head_stays_with_the_embedding(tmp_path: Path) -> None:
    write_tiny(tmp_path, tie_word_embeddings=True)
    model = load_model(*opened(tmp_path), CPU, torch.bfloat16, quantization="int8")
    assert model.embed_tokens.dtype is torch.bfloat16
    assert getattr(model.lm_head, "weight", None) is model.embed_tokens


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path, sharded=False)
    with torch.no_grad():
        tiny.theirs.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    tiny.theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight' holds numbers that are not finite"):
        load_model(*opened(tmp_path), CPU, torch.float32, quantization="int4")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_plan_counts_what_is_held(tmp_path: Path, quantization: str) -> None:
    write_tiny(tmp_path)
    checkpoint, config = opened(tmp_path)
    weights = Weights(checkpoint, shapes_of(config), quantization)
    size = 0
    for name in shapes_of(config):
        read = weights.read(name)
        if isinstance(read, QuantizedWeight):
            size += sum(part.nbytes for part in (read.values, read.scales, read.zeros) if part is not None)
        else:
            size += read.numel() * 2
    plan = MemoryPlan.of(config, EngineOptions(quantization=quantization), "bfloat16", 512)
    assert plan.weights == size
    assert plan.weight_format == quantization
    assert plan == MemoryPlan.of(
        config, EngineOptions(quantization=quantization), "bfloat16", 512, layouts=weights.layouts
    )


def test_the_official_sizes(shared: Path) -> None:
    """GLM-4-32B in int4: layers have 4 + 40/128 bits, the head 8, the embedding 16; the rest hardly counts."""
    config = Glm4Config.from_dict(read_json(shared / "glm4-0414" / "GLM-4-32B-0414" / "config.json"))
    plan = MemoryPlan.of(config, EngineOptions(quantization="int4"), "bfloat16", 4096)
    table = config.vocab_size * config.hidden_size
    layers = sum(shape[0] * shape[1] for name, shape in shapes_of(config).items() if "_proj.weight" in name)
    assert plan.weights == pytest.approx(layers * 4.3125 / 8 + table + 2 * table, rel=3e-4)
    assert {layout.group_size for layout in plan.layouts.values() if layout.bits == 4} == {128}


def test_the_benchmark_counts_the_bytes_that_a_step_reads(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    _, config = opened(tmp_path)
    layouts = chosen_layouts(shapes_of(config), "int4")
    plan = MemoryPlan.of(config, EngineOptions(), "bfloat16", 512, layouts=layouts)
    embedding = 2 * config.vocab_size * config.hidden_size
    assert Work.of(config, torch.bfloat16, layouts).bytes_per_step == plan.weights - embedding


@pytest.mark.parametrize(
    ("quantization", "limit", "advice"),
    [
        ("none", 15, "use --quantization int8 (10.0 GiB), or share bfloat16 weights among 2 cards"),
        ("none", 8, "use --quantization int4 (6.5 GiB), or share bfloat16 weights among 4 cards"),
        ("int8", 8, "use --quantization int4 (6.5 GiB), or share int8 weights among 2 cards"),
        ("int4", 4, "share int4 weights among 2 cards"),
    ],
)
def test_the_plan_advises_to_quantise(shared: Path, quantization: str, limit: int, advice: str) -> None:
    config = Glm4Config.from_dict(read_json(shared / "glm4-0414" / "GLM-4-9B-0414" / "config.json"))
    plan = MemoryPlan.of(config, EngineOptions(quantization=quantization), "bfloat16", config.max_context)
    with pytest.raises(MemoryPlanError) as caught:
        plan.kv_blocks(limit * 2**30)
    assert advice in str(caught.value)


def test_no_advice_to_quantise_what_is_stored_quantised(shared: Path) -> None:
    config = Glm4Config.from_dict(read_json(shared / "glm4-0414" / "GLM-4-9B-0414" / "config.json"))
    layouts = chosen_layouts(shapes_of(config), "int8")
    plan = MemoryPlan.of(config, EngineOptions(), "bfloat16", config.max_context, layouts=layouts)
    with pytest.raises(MemoryPlanError, match=r"int8 weights .* used: share int8 weights among 2 cards"):
        plan.kv_blocks(8 * 2**30)


MEASURE = """
import sys, torch
from pathlib import Path
from test_loading_quantized import QuantizedLinear, load_model, loading, opened

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

# The kernels would repack into pages of a size of their own.
loading.make_quantized_linear = lambda weight, bias, arena: QuantizedLinear(weight, bias)
checkpoint, config = opened(Path(sys.argv[1]))
before = anonymous()
most = 0
def look(name):
    global most
    most = max(most, anonymous())
model = load_model(checkpoint, config, torch.device("cpu"), torch.bfloat16, look, "int4")
print(most - before)
"""


def test_loading_holds_one_weight_at_a_time(tmp_path: Path) -> None:
    """A folder of 218 MB becomes a model of 30 MB; beside it there are few blocks of numbers, whatever the folder."""
    write_tiny(
        tmp_path, sharded=False, hidden_size=1024, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
        head_dim=128,
    )  # fmt: skip
    checkpoint, config = opened(tmp_path)
    plan = MemoryPlan.of(config, EngineOptions(quantization="int4"), "bfloat16", 512)
    script = [sys.executable, "-c", MEASURE, str(tmp_path)]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]
    done = subprocess.run(script, capture_output=True, text=True, env={"PYTHONPATH": ":".join(paths)})
    assert done.returncode == 0, done.stderr
    whole = sum(checkpoint.info(name).end - checkpoint.info(name).begin for name in checkpoint.names())
    assert int(done.stdout) < plan.weights + 64 * 2**20 < whole / 2


@pytest.mark.parametrize(("quantization", "group_size"), [("int8", 128), ("int4", 128), ("int4", 32)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_folder_holds_what_loading_gives(
    tmp_path: Path, quantization: str, group_size: int, dtype: str
) -> None:
    write_tiny(tmp_path / "source", dtype=dtype, **SHAPE)
    checkpoint, config = opened(tmp_path / "source")
    shapes = shapes_of(config)
    write_packed(checkpoint.folder, tmp_path / "packed", shapes, quantization, group_size)
    packed, again = opened(tmp_path / "packed")
    assert again == config
    stored, made = Weights(packed, shapes), Weights(checkpoint, shapes, quantization, group_size)
    stored.check()
    assert stored.layouts == made.layouts
    for name in shapes:
        ours, theirs = stored.read(name), made.read(name)
        if isinstance(theirs, Tensor):
            assert isinstance(ours, Tensor)
            assert ours.dtype is theirs.dtype
            assert torch.equal(ours, theirs)
            continue
        assert isinstance(ours, PanelWeight)
        assert isinstance(theirs, QuantizedWeight)
        for part in (ours.values, ours.scales, ours.zeros):
            assert part is None or part.nbytes % 64 or part.data_ptr() % 64 == 0
        ours = ours.unpack()
        assert (ours.bits, ours.group_size) == (theirs.bits, theirs.group_size)
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.scales, theirs.scales)
        assert (ours.zeros is None) == (theirs.zeros is None)
        assert ours.zeros is None or theirs.zeros is None or torch.equal(ours.zeros, theirs.zeros)
    ids = list(range(5, 40))
    if group_size == 128:
        loaded = load_model(checkpoint, config, CPU, getattr(torch, dtype), quantization=quantization)
        assert torch.equal(logits(load_model(packed, config, CPU, getattr(torch, dtype)), ids), logits(loaded, ids))
