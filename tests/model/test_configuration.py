"""config.json: the official files, both spellings of RoPE, and everything that must be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.glm4.modeling_glm4 import Glm4RotaryEmbedding

from glm4.errors import ConfigError
from glm4.files import read_json
from glm4.model.configuration_glm4 import Glm4Config, folder_sampling
from glm4.model.modeling_glm4 import RotaryEmbedding
from glm4.options import SamplingParams

OFFICIAL = [
    "GLM-4-9B-0414",
    "GLM-4-32B-0414",
    "GLM-Z1-9B-0414",
    "GLM-Z1-32B-0414",
    "GLM-Z1-Rumination-32B-0414",
]
GOOD: dict[str, Any] = {
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [1, 2],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 112,
    "max_position_embeddings": 128,
    "model_type": "glm4",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 100,
}
NOT_NEEDED = ("architectures", "model_type", "attention_dropout", "eos_token_id")
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configs_say_what_transformers_reads(shared: Path, name: str) -> None:
    folder = shared / "glm4-0414" / name
    ours = Glm4Config.from_dict(read_json(folder / "config.json"))
    theirs = transformers.Glm4Config.from_pretrained(folder)
    for field in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "attention_bias", "tie_word_embeddings"),
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.max_context == theirs.max_position_embeddings
    assert list(ours.eos_token_ids) == theirs.eos_token_id
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.partial_rotary_factor == theirs.rope_parameters["partial_rotary_factor"]


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key not in keys}


def test_the_newer_spelling_is_the_older_one() -> None:
    newer = without("rope_theta", "partial_rotary_factor")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert Glm4Config.from_dict(newer | {"rope_parameters": rope}) == Glm4Config.from_dict(GOOD)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"attention_factor": 1.3},
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"mscale": 1.0, "mscale_all_dim": 0.8},
        {"truncate": False},
        {"factor": 2.5},
    ],
)
@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_yarn_angles_equal_transformers(extra: dict[str, Any], spelling: str) -> None:
    config = GOOD | {"rope_scaling": {spelling: "yarn"} | YARN | extra}
    ours = RotaryEmbedding(Glm4Config.from_dict(config))
    theirs = Glm4RotaryEmbedding(transformers.Glm4Config(**config))
    positions = torch.arange(400)
    cos, sin = ours(positions, torch.float32)
    their_cos, their_sin = theirs(torch.zeros(1, dtype=torch.float32), positions[None])
    assert torch.equal(cos, their_cos[0, :, : cos.shape[1]])
    assert torch.equal(sin, their_sin[0, :, : sin.shape[1]])


def test_yarn_stretches_the_context() -> None:
    assert Glm4Config.from_dict(GOOD | {"rope_scaling": {"type": "yarn"} | YARN}).max_context == 512


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *((without(key), f"{key} is missing") for key in GOOD if key not in NOT_NEEDED),
        (without("eos_token_id"), "eos_token_id is None"),
        (GOOD | {"sliding_window": 4096}, "unknown key 'sliding_window' might change what the model computes"),
        (GOOD | {"rms_norm_epz": 1e-6}, "unknown key 'rms_norm_epz'.*did you mean 'rms_norm_eps'"),
        (GOOD | {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        (GOOD | {"hidden_size": "64"}, "hidden_size is '64', not a whole number above 0"),
        (GOOD | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (GOOD | {"attention_bias": "yes"}, "attention_bias is 'yes', not true or false"),
        (GOOD | {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (GOOD | {"partial_rotary_factor": 0.1}, "is not an even part of a head"),
        (GOOD | {"eos_token_id": [100]}, "eos_token_id 100 is beyond vocab_size 100"),
        (GOOD | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        (GOOD | {"rope_scaling": {"factor": 2.0}}, "factor given without rope_type"),
        (GOOD | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings is missing"),
        (GOOD | {"rope_scaling": {"type": "yarn"} | YARN | {"factr": 1}}, "unknown key 'factr' in rope_parameters"),
        (GOOD | {"rope_scaling": {"type": "yarn"} | YARN | {"factor": -4}}, "factor is -4, not a number above 0"),
        (GOOD | {"rope_scaling": [4]}, r"rope_parameters is \[4\], not an object"),
    ],
)  # fmt: skip
def test_what_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Glm4Config.from_dict(config, "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("extra", [{"use_cache": False}, {"_attn_implementation": "x"}, {"sliding_window": None}])
def test_what_is_harmless_is_ignored(extra: dict[str, Any]) -> None:
    assert Glm4Config.from_dict(GOOD | extra) == Glm4Config.from_dict(GOOD)


def test_sampling_of_the_folder(official_9b: Path) -> None:
    assert folder_sampling(read_json(official_9b / "generation_config.json"), thinks=False) == SamplingParams()
    assert folder_sampling({"temperature": 0.6, "top_p": 0.9}, thinks=False) == SamplingParams()  # no do_sample
    said = {"do_sample": True, "temperature": 0.6, "max_new_tokens": 9, "eos_token_id": 3}
    assert folder_sampling(said, thinks=True) == SamplingParams(do_sample=True, temperature=0.6, max_new_tokens=9)
    advice = folder_sampling({"eos_token_id": 3}, thinks=True)
    assert (advice.temperature, advice.top_p, advice.top_k, advice.max_new_tokens) == (0.6, 0.95, 40, 30000)
    with pytest.raises(ConfigError, match=r"generation_config.json: top_p: 7 is out of range"):
        folder_sampling({"do_sample": True, "top_p": 7}, thinks=False)
