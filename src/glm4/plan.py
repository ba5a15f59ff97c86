"""What a model needs in memory, before any of it is loaded. Sizes are bytes, counts are tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from glm4.errors import MemoryPlanError
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.utils import tensor_specs
from glm4.options import EngineOptions

ITEMSIZE = {"bfloat16": 2, "float32": 4}
_LEAST_CONTEXT = 1024  # a KV cache for less is of no use to anybody


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What each of `cards` cards holds."""

    config: Glm4Config
    dtype: str
    cards: int
    max_batch_tokens: int
    max_batch_requests: int
    block_size: int
    context: int
    """Longest prompt plus answer that is asked for."""

    @classmethod
    def of(cls, config: Glm4Config, options: EngineOptions, dtype: str, context: int, cards: int = 1) -> MemoryPlan:
        """The plan for an engine with these options; `context`: longest prompt plus answer."""
        return cls(
            config=config,
            dtype=dtype,
            cards=cards,
            max_batch_tokens=min(options.max_batch_tokens, context),
            max_batch_requests=options.max_batch_requests,
            block_size=options.block_size,
            context=context,
        )

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint."""
        return sum(spec.numel for spec in tensor_specs(self.config))

    @property
    def weights(self) -> int:
        """Weights; what is cut is shared out, the rest is held by every card."""
        specs = tensor_specs(self.config)
        numbers = sum(-(-s.numel // self.cards) if s.shard_axis is not None else s.numel for s in specs)
        return numbers * ITEMSIZE[self.dtype]

    @property
    def kv_per_token(self) -> int:
        """Keys and values of one token; beyond one KV head a card, heads are repeated."""
        heads = max(1, self.config.num_key_value_heads // self.cards)
        return 2 * self.config.num_hidden_layers * heads * self.config.head_dim * ITEMSIZE[self.dtype]

    @property
    def workspace(self) -> int:
        """Activations of the largest step: the widest point of a layer, a mask, and two copies of the logits."""
        config, itemsize = self.config, ITEMSIZE[self.dtype]
        row = 8 * config.hidden_size + 4 * config.intermediate_size // self.cards
        mask = self.max_batch_tokens * self.context * (1 + itemsize)
        return self.max_batch_tokens * row * itemsize + mask + 2 * self.max_batch_requests * config.vocab_size * 4

    @property
    def least(self) -> int:
        """What it takes to run at all."""
        return self.weights + self.workspace + min(self.context, _LEAST_CONTEXT) * self.kv_per_token

    def kv_blocks(self, limit: int, free: int = 0) -> int:
        """Blocks of the KV cache that fit beside weights and workspace in `limit`, never more than can be used.

        `free`: what is there, where the user allows less.

        Raises MemoryPlanError, naming the smallest change that fits, when the model does not run in `limit`.
        """
        if self.least > limit:
            raise MemoryPlanError(
                f"{self.dtype} weights take {gib(self.weights)}, with workspace and the shortest useful KV cache "
                f"{gib(self.least)}, and {gib(limit)} may be used: {self._smallest_change(limit, free)}"
            )
        useful = -(-self.context // self.block_size) * self.max_batch_requests
        return min(self.kv_tokens(limit) // self.block_size, useful)

    def kv_tokens(self, limit: int) -> int:
        """Tokens that the KV cache holds in `limit`, however many are useful; 0 when the model does not run in it."""
        return (limit - self.weights - self.workspace) // self.kv_per_token if self.least <= limit else 0

    def _smallest_change(self, limit: int, free: int) -> str:
        if self.least <= free:
            return f"{gib(free)} are free, so raise max_device_memory"
        smaller_step = replace(self, max_batch_tokens=min(self.max_batch_tokens, 256))
        if smaller_step.least <= limit:
            return f"set max_batch_tokens to {smaller_step.max_batch_tokens}"
        shorter = replace(smaller_step, context=_LEAST_CONTEXT)
        if shorter.least <= limit:
            return f"set max_model_len to {_LEAST_CONTEXT} and max_batch_tokens to {shorter.max_batch_tokens}"
        if self.dtype == "float32":
            halved = replace(self, dtype="bfloat16")
            if halved.least <= limit:
                return f"use --dtype bfloat16 ({gib(halved.least)})"
        for cards in (2, 4, 8):
            shared = replace(self, cards=cards, dtype="bfloat16")
            if self.config.num_attention_heads % cards == 0 and shared.least <= limit:
                return (
                    f"share bfloat16 weights among {cards} cards of this size ({gib(shared.least)} each; several cards "
                    "are not in this version yet)"
                )
        return "it needs a larger machine; `glm4 plan` shows what fits where"


def gib(size: int) -> str:
    """`size` bytes in GiB, for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
