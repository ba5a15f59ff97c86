"""The shape and the mathematics of a GLM-4-0414 model, read from its config.json and never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm4.errors import ConfigError, OptionError
from glm4.options import SamplingParams, nearest, options_from

# Keys of config.json that do not change what the model computes at inference.
_HARMLESS_KEYS = frozenset(
    """architectures model_type torch_dtype dtype transformers_version use_cache initializer_range attention_dropout
    bos_token_id pad_token_id eos_token_id decoder_start_token_id auto_map tokenizer_class name_or_path
    return_dict output_hidden_states output_attentions torchscript pruned_heads is_encoder_decoder is_decoder
    id2label label2id num_labels problem_type finetuning_task task_specific_params chunk_size_feed_forward
    prefix sep_token_id use_bfloat16 add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    generation_config license quantization_config compression_config""".split()
)
_ROPE_KEYS = frozenset(
    """rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor
    beta_fast beta_slow mscale mscale_all_dim truncate""".split()
)


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """Rotary position embedding: interleaved pairs over the first part of each head; YaRN where factor > 1.

    YaRN: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023.
    """

    theta: float
    partial_rotary_factor: float
    yarn: bool = False
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Glm4Config:
    """What decides the weights' shapes and the arithmetic. Names are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    attention_bias: bool
    tie_word_embeddings: bool
    rope: RopeParameters
    eos_token_ids: tuple[int, ...]

    @property
    def rotary_dim(self) -> int:
        """How many of a head's `head_dim` numbers are rotated."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def max_context(self) -> int:
        """Longest sequence the position embedding covers, in tokens."""
        if self.rope.yarn:
            return max(self.max_position_embeddings, int(self.rope.factor * self.rope.original_max_position_embeddings))
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> Glm4Config:
        """The config in `values`, the content of the file `source`.

        Raises ConfigError for a missing or malformed key, for an unknown key (it might change the mathematics),
        and for anything this model does not compute.
        """
        keys = _Keys(values, source)
        keys.equals("hidden_act", "silu")
        config = cls(
            vocab_size=keys.count("vocab_size"),
            hidden_size=keys.count("hidden_size"),
            intermediate_size=keys.count("intermediate_size"),
            num_hidden_layers=keys.count("num_hidden_layers"),
            num_attention_heads=keys.count("num_attention_heads"),
            num_key_value_heads=keys.count("num_key_value_heads"),
            head_dim=keys.count("head_dim"),
            rms_norm_eps=keys.number("rms_norm_eps"),
            max_position_embeddings=keys.count("max_position_embeddings"),
            attention_bias=keys.flag("attention_bias"),
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            rope=_read_rope(values, keys, source),
            eos_token_ids=_read_eos(values, source),
        )
        keys.refuse_unknown()
        config._check(source)
        return config

    def _check(self, source: str) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{source}: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; the file is damaged"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ConfigError(
                f"{source}: head_dim {self.head_dim} × partial_rotary_factor {self.rope.partial_rotary_factor} "
                "is not an even part of a head; the file is damaged"
            )
        for token_id in self.eos_token_ids:
            if token_id >= self.vocab_size:
                raise ConfigError(f"{source}: eos_token_id {token_id} is beyond vocab_size {self.vocab_size}")


class _Keys:
    """Typed access to config.json that remembers which keys were understood."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source
        self.read: set[str] = set()

    def _get(self, key: str) -> Any:
        self.read.add(key)
        if self.values.get(key) is None:
            raise ConfigError(f"{self.source}: {key} is missing; take the file from the original model folder")
        return self.values[key]

    def _wrong(self, key: str, wanted: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key} is {self.values[key]!r}, not {wanted}")

    def count(self, key: str) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, "a whole number above 0")
        return value

    def number(self, key: str) -> float:
        value = self._get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise self._wrong(key, "a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def equals(self, key: str, only: str) -> None:
        if self._get(key) != only:
            raise self._wrong(key, f"{only!r}, the only one that GLM-4-0414 uses")

    def refuse_unknown(self) -> None:
        known = self.read | _HARMLESS_KEYS
        for key, value in self.values.items():
            if key in known or key.startswith("_") or value is None:
                continue
            raise ConfigError(
                f"{self.source}: unknown key {key!r} might change what the model computes{nearest(key, known)}; "
                "remove it if it does not"
            )


def _read_rope(values: Mapping[str, Any], keys: _Keys, source: str) -> RopeParameters:
    """RoPE from the newer `rope_parameters`, or the older `rope_theta` with `rope_scaling`."""
    keys.read |= {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
    flat = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if values.get(key) is not None}
    nested = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(nested, Mapping):
        raise ConfigError(f"{source}: rope_parameters is {nested!r}, not an object")
    rope = flat | {key: value for key, value in nested.items() if value is not None}
    for key in rope:
        if key not in _ROPE_KEYS:
            raise ConfigError(f"{source}: unknown key {key!r} in rope_parameters{nearest(key, _ROPE_KEYS)}")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{source}: rope_type {kind!r} is not supported; GLM-4 uses 'default' or 'yarn'")
    needed = ["rope_theta", "partial_rotary_factor"]
    needed += ["factor", "original_max_position_embeddings"] if kind == "yarn" else []
    for key in needed:
        if key not in rope:
            raise ConfigError(f"{source}: {key} is missing; take the file from the original model folder")
    for key, value in rope.items():
        if not isinstance(value, (bool if key == "truncate" else (int, float))) or (key != "truncate" and value <= 0):
            raise ConfigError(f"{source}: {key} is {value!r}, not a number above 0")
    theta = float(rope.pop("rope_theta"))
    if kind == "default":
        if set(rope) - {"partial_rotary_factor", "original_max_position_embeddings"}:
            raise ConfigError(
                f"{source}: {', '.join(sorted(set(rope) - {'partial_rotary_factor'}))} given without rope_type; "
                "say rope_type 'yarn' or remove them"
            )
        return RopeParameters(theta, float(rope["partial_rotary_factor"]))
    return RopeParameters(theta=theta, yarn=True, **rope)


def _read_eos(values: Mapping[str, Any], source: str) -> tuple[int, ...]:
    eos = values.get("eos_token_id")
    ids = [eos] if isinstance(eos, int) else eos
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ConfigError(f"{source}: eos_token_id is {eos!r}, not a token id or a list of them")
    return tuple(ids)


# Zhipu's advice for the GLM-Z1 models.
_Z1_ADVICE = SamplingParams(do_sample=True, temperature=0.6, top_p=0.95, top_k=40, max_new_tokens=30000)
_GENERATION_KEYS = {
    "do_sample": "do_sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
}


def folder_sampling(generation: Mapping[str, Any], thinks: bool) -> SamplingParams:
    """What the folder says of sampling: its generation_config.json, else the advice for a model that thinks.

    `thinks`: the generation prompt ends in <think>, so the folder is a GLM-Z1. No `do_sample` means greedy, as
    in transformers. Raises ConfigError for a value that is out of range.
    """
    said = {ours: generation[key] for key, ours in _GENERATION_KEYS.items() if generation.get(key) is not None}
    if thinks and not said:
        return _Z1_ADVICE
    if not said.get("do_sample", False):
        said = {key: value for key, value in said.items() if key.endswith(("_new_tokens", "_penalty"))}
    try:
        params: SamplingParams = options_from(SamplingParams, said)
    except OptionError as error:
        raise ConfigError(f"generation_config.json: {error}") from error
    return params
