"""The weights of a GLM-4 model: name, shape, and the axis along which several cards share them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from glm4.model.configuration_glm4 import Glm4Config


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One weight of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    shard_axis: int | None = None
    """0: cut by rows (outputs), 1: by columns (inputs), None: every card holds all of it."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def layer_specs(config: Glm4Config, layer: int) -> Iterator[TensorSpec]:
    """The weights of decoder layer `layer`, in the order in which the layer uses them."""
    prefix = f"model.layers.{layer}."
    hidden, q_size = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    yield TensorSpec(prefix + "input_layernorm.weight", (hidden,))
    for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        yield TensorSpec(f"{prefix}self_attn.{name}_proj.weight", (size, hidden), 0)
        if config.attention_bias:
            yield TensorSpec(f"{prefix}self_attn.{name}_proj.bias", (size,), 0)
    yield TensorSpec(prefix + "self_attn.o_proj.weight", (hidden, q_size), 1)
    yield TensorSpec(prefix + "post_self_attn_layernorm.weight", (hidden,))
    yield TensorSpec(prefix + "post_attention_layernorm.weight", (hidden,))
    yield TensorSpec(prefix + "mlp.gate_up_proj.weight", (2 * config.intermediate_size, hidden), 0)
    yield TensorSpec(prefix + "mlp.down_proj.weight", (hidden, config.intermediate_size), 1)
    yield TensorSpec(prefix + "post_mlp_layernorm.weight", (hidden,))


def tensor_specs(config: Glm4Config) -> Iterator[TensorSpec]:
    """Every weight that the model's safetensors files must hold, and no other."""
    yield TensorSpec("model.embed_tokens.weight", (config.vocab_size, config.hidden_size), 0)
    for layer in range(config.num_hidden_layers):
        yield from layer_specs(config, layer)
    yield TensorSpec("model.norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", (config.vocab_size, config.hidden_size), 0)


def shapes_of(config: Glm4Config) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by its name, in the order of `tensor_specs`."""
    return {spec.name: spec.shape for spec in tensor_specs(config)}
