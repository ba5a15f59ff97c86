"""Which part of each weight a rank holds, and that it reads no other."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_threads import CPU, opened
from safetensors.torch import load_file, save_file
from tiny import edit_json, write_tiny
from torch import Tensor

from glm4.errors import OptionError
from glm4.files import read_json
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.model.sharding import Shard, allowed_degrees
from glm4.model.utils import shapes_of, tensor_specs
from glm4.ops.quantized import QuantizedWeight
from glm4.quantization.layout import chosen_layouts
from glm4.quantization.weights import Weights


@pytest.mark.parametrize(
    ("model", "degrees"),
    [
        ("GLM-4-9B-0414", [1, 2, 4, 8, 16, 32]),
        ("GLM-4-32B-0414", [1, 2, 4, 6, 8, 12, 16, 24, 48]),
        ("GLM-Z1-Rumination-32B-0414", [1, 2, 4, 8, 16, 24, 48]),
    ],
)
def test_degrees_of_the_official_models(shared: Path, model: str, degrees: list[int]) -> None:
    config = Glm4Config.from_dict(read_json(shared / "glm4-0414" / model / "config.json"))
    assert allowed_degrees(config) == degrees
    for degree in degrees:
        Shard(0, degree).check(config)
    with pytest.raises(OptionError, match=f"tensor_parallel 3 .*: use {' or '.join(map(str, degrees))}$"):
        Shard(0, 3).check(config)
    with pytest.raises(OptionError, match=rf"pipeline_parallel 99 .* {config.num_hidden_layers} layers"):
        Shard(0, 1, 0, 99).check(config)


@pytest.mark.parametrize(("model", "degree"), [("GLM-4-9B-0414", 2), ("GLM-4-32B-0414", 8)])
def test_groups_of_128_that_straddle_the_official_cuts(shared: Path, model: str, degree: int) -> None:
    config = Glm4Config.from_dict(read_json(shared / "glm4-0414" / model / "config.json"))
    assert config.intermediate_size // degree % 128
    layouts = chosen_layouts(shapes_of(config), "int4")
    place = 0
    for rank in range(degree):
        cuts = Shard(rank, degree).cuts(config, layouts)
        [(first, end)] = cuts["model.layers.0.mlp.down_proj.weight"].ranges
        assert (first, first % 128, end % 128) == (place, 0, 0)
        assert abs(end - first - config.intermediate_size / degree) < 128
        gate, up = cuts["model.layers.0.mlp.gate_up_proj.weight"].ranges
        assert gate == (first, end)
        assert up == (config.intermediate_size + first, config.intermediate_size + end)
        place = end
    assert place == config.intermediate_size


@st.composite
def models(draw: st.DrawFn) -> Glm4Config:
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    return Glm4Config.from_dict(
        {
            "model_type": "glm4",
            "vocab_size": draw(st.integers(1, 100)),
            "hidden_size": 32,
            "intermediate_size": 8 * draw(st.integers(1, 60)),
            "num_hidden_layers": draw(st.integers(1, 7)),
            "num_attention_heads": kv_heads * draw(st.integers(1, 4)),
            "num_key_value_heads": kv_heads,
            "head_dim": draw(st.sampled_from([16, 32])),
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": draw(st.booleans()),
            "tie_word_embeddings": draw(st.booleans()),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "eos_token_id": [0],
        }
    )


@given(models(), st.sampled_from(["none", "int8", "int4"]), st.data())
def test_the_ranks_together_hold_each_weight_once(config: Glm4Config, quantization: str, data: st.DataObject) -> None:
    """By counting rows and columns: KV heads are there as often as there are ranks to each, what is not cut on all."""
    degree = data.draw(st.sampled_from(allowed_degrees(config)))
    stages = data.draw(st.integers(1, config.num_hidden_layers))
    layouts = chosen_layouts(shapes_of(config), quantization)
    found: dict[str, Counter[int]] = {spec.name: Counter() for spec in tensor_specs(config)}
    for stage in range(stages):
        for rank in range(degree):
            shard = Shard(rank, degree, stage, stages)
            cuts = shard.cuts(config, layouts)
            for spec in shard.specs(config):
                cut = cuts.get(spec.name)
                assert cut is None or cut.axis == spec.shard_axis
                for first, end in cut.ranges if cut else ((0, spec.shape[spec.shard_axis or 0]),):
                    found[spec.name].update(range(first, end))
    for spec in tensor_specs(config):
        times = 1 if spec.shard_axis is not None else degree
        if "k_proj" in spec.name or "v_proj" in spec.name:
            times = max(1, degree // config.num_key_value_heads)
        if "embed_tokens" in spec.name and config.tie_word_embeddings and stages > 1:
            times *= 2  # the head is the embedding, on another stage
        assert found[spec.name] == dict.fromkeys(range(spec.shape[spec.shard_axis or 0]), times)


@given(models(), st.sampled_from(["none", "int8", "int4"]), st.data())
def test_no_rank_holds_more_than_the_last_that_shares_its_matrices(
    config: Glm4Config, quantization: str, data: st.DataObject
) -> None:
    degree = data.draw(st.sampled_from(allowed_degrees(config)))
    layouts = chosen_layouts(shapes_of(config), quantization)
    last = Shard(degree - 1, degree).held(config, layouts)
    for other in zip(last, *(Shard(rank, degree).held(config, layouts) for rank in range(degree)), strict=True):
        (most, _), *others = other
        assert all(spec.numel <= most.numel for spec, _ in others)


@given(st.integers(1, 70), st.data())
def test_stages_are_even_and_the_one_with_the_head_has_no_more_layers(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    config = replace(data.draw(models()), num_hidden_layers=layers)
    parts = [list(Shard(0, 1, stage, stages).layers(config)) for stage in range(stages)]
    assert list(chain.from_iterable(parts)) == list(range(layers))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)


def part_by_heads(weight: Tensor, name: str, rank: int, degree: int, config: Glm4Config) -> Tensor:
    """What a rank holds of a weight that is not quantised, said in another way: KV heads are those its queries ask."""
    module = name.split(".")[-2]
    if module in ("o_proj", "down_proj"):
        return weight.chunk(degree, 1)[rank]
    if module == "gate_up_proj":
        gate, up = weight.chunk(2)
        return torch.cat((gate.chunk(degree)[rank], up.chunk(degree)[rank]))
    if module in ("k_proj", "v_proj"):
        heads = weight.view(config.num_key_value_heads, config.head_dim, -1)
        heads_of_queries = torch.arange(config.num_attention_heads) * len(heads) // config.num_attention_heads
        mine = heads_of_queries.chunk(degree)[rank].unique()
        return heads[mine].view(-1, *weight.shape[1:])
    return weight.chunk(degree)[rank] if module in ("q_proj", "embed_tokens", "lm_head") else weight


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_what_is_read_is_the_part_and_nothing_is_copied(tmp_path: Path, degree: int) -> None:
    write_tiny(tmp_path, sharded=False, num_attention_heads=8, intermediate_size=128)
    checkpoint, config = opened(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weights = Weights(checkpoint, shapes_of(config))
    for rank in range(degree):
        cuts = Shard(rank, degree).cuts(config, {})
        held = {spec.name: spec.shape for spec, _ in Shard(rank, degree).held(config, {})}
        assert held.keys() == stored.keys()
        for name, whole in stored.items():
            part = weights.read(name, cuts.get(name))
            assert isinstance(part, Tensor)
            assert torch.equal(part, part_by_heads(whole, name, rank, degree, config))
            assert tuple(part.shape) == held[name]
            mapped = weights.read(name)
            assert isinstance(mapped, Tensor)
            for piece in cuts[name].one_by_one() if name in cuts else [None]:
                view = weights.read(name, piece)
                assert isinstance(view, Tensor)
                assert mapped.data_ptr() <= view.data_ptr() < mapped.data_ptr() + mapped.nbytes


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_what_is_held_is_what_was_said(tmp_path: Path, quantization: str, degree: int) -> None:
    """The memory plan rests on it: bytes of uneven parts, and of groups that are cut in two."""
    write_tiny(tmp_path, num_attention_heads=8, intermediate_size=384, hidden_size=128, head_dim=32)
    checkpoint, config = opened(tmp_path)
    weights = Weights(checkpoint, shapes_of(config), quantization)
    for rank in range(degree):
        shard = Shard(rank, degree)
        cuts = shard.cuts(config, weights.layouts)
        for spec, layout in shard.held(config, weights.layouts):
            read = weights.read(spec.name, cuts.get(spec.name))
            if isinstance(read, Tensor):
                assert (tuple(read.shape), layout) == (spec.shape, None)
                continue
            assert isinstance(read, QuantizedWeight)
            assert layout is not None
            assert (read.out_features, read.in_features) == spec.shape
            assert (read.bits, read.group_size, read.zeros is not None) == (
                layout.bits, layout.group_size, layout.zeros,
            )  # fmt: skip
            parts = (read.values, read.scales, read.zeros)
            assert layout.nbytes(spec.shape) == sum(part.nbytes for part in parts if part is not None)


@pytest.mark.parametrize(("degree", "heads"), [(1, 2), (2, 1), (4, 1), (8, 1)])
def test_the_kv_cache_has_room_for_the_ranks_own(tmp_path: Path, degree: int, heads: int) -> None:
    write_tiny(tmp_path, num_attention_heads=8, num_key_value_heads=2)
    for stage, layers in ((0, 2), (1, 1)):
        model = load_model(*opened(tmp_path), CPU, torch.float32, shard=Shard(degree - 1, degree, stage, 2))
        cache = model.new_kv_cache(10, torch.float32)
        assert [tuple(keys.data.shape) for keys, _ in cache] == [(10, heads, 16)] * layers


MEASURE = """
import sys, torch
from pathlib import Path
from rank_threads import opened
from glm4.model.loading import load_model
from glm4.model.sharding import Shard

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def look(name):
    global most
    most = max(most, anonymous() - before)

checkpoint, config = opened(Path(sys.argv[1]))
most, before = 0, anonymous()
shard = Shard(int(sys.argv[2]), int(sys.argv[3]))
load_model(checkpoint, config, torch.device("cpu"), torch.bfloat16, look, sys.argv[4], shard)
print(most)
"""
SLACK = 40 * 2**20
"""For what one weight takes while it is quantised, whatever the folder."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 230 MB; the linear weights are 110 MB in int8, 62 MB in int4."""
    path = tmp_path_factory.mktemp("large")
    write_tiny(path, sharded=False, num_attention_heads=8)
    shape = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 4096, "num_hidden_layers": 10, "head_dim": 64}
    edit_json(path / "config.json", **shape)
    specs = tensor_specs(Glm4Config.from_dict(read_json(path / "config.json")))
    save_file({spec.name: torch.full(spec.shape, 0.01).bfloat16() for spec in specs}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(("quantization", "degree"), [("none", 2), ("none", 4), ("int8", 4), ("int4", 4)])
def test_a_rank_takes_its_share_of_private_memory(large: Path, quantization: str, degree: int) -> None:
    """Nothing where weights stay in the mapped file."""
    script = [sys.executable, "-c", MEASURE, str(large), str(degree - 1), str(degree), quantization]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]
    environment = {"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"}  # each thread has its own block of numbers
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    _, config = opened(large)
    layouts = chosen_layouts(shapes_of(config), quantization)
    whole = sum(layouts[spec.name].nbytes(spec.shape) for spec in tensor_specs(config) if spec.name in layouts)
    parts = Shard(degree - 1, degree).held(config, layouts)
    share = sum(layout.nbytes(spec.shape) for spec, layout in parts if layout is not None)
    assert int(done.stdout) < share + SLACK
    assert not layouts or share + SLACK < whole  # or this would show nothing
