"""What a model needs in memory, before any of it is loaded. Sizes are bytes, counts are tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from glm4.errors import MemoryPlanError
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.sharding import Shard, allowed_degrees
from glm4.model.utils import shapes_of, tensor_specs
from glm4.options import EngineOptions
from glm4.quantization.layout import Layout, chosen_layouts

ITEMSIZE = {"bfloat16": 2, "float32": 4}
_KV_ITEMSIZE = ITEMSIZE | {"int8": 1}
_SCALE_BYTES = 4  # of an int8 key or value, one for each token and head
_LEAST_CONTEXT = 1024  # a KV cache for less is of no use to anybody


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What each of `cards` cards holds."""

    config: Glm4Config
    dtype: str
    cards: int
    """Cards that share every matrix."""
    max_batch_tokens: int
    max_batch_requests: int
    block_size: int
    context: int
    """Longest prompt plus answer that is asked for."""
    kv_cache_dtype: str
    """One of options.KV_CACHE_DTYPES."""
    quantization: str = "none"
    """What weights are rounded to while they load, one of options.QUANTIZATIONS."""
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """The weights that are not held in `dtype`."""
    stages: int = 1
    """Groups of cards that hold some of the layers each; the plan is that of the largest."""
    draft: MemoryPlan | None = None
    """The model that guesses, if there is one: it is counted in, and holds as many tokens."""

    @classmethod
    def of(
        cls,
        config: Glm4Config,
        options: EngineOptions,
        dtype: str,
        context: int,
        cards: int | None = None,
        draft: Glm4Config | None = None,
        layouts: Mapping[str, Layout] | None = None,
    ) -> MemoryPlan:
        """The plan for an engine with these options; `context`: longest prompt plus answer; `draft`: guesses for it.

        cards: instead of options.tensor_parallel.

        layouts: how weights are held that are not in `dtype`; none: as options.quantization says.
        """
        return cls(
            config=config,
            dtype=dtype,
            cards=options.tensor_parallel if cards is None else cards,
            stages=options.pipeline_parallel,
            max_batch_tokens=min(options.max_batch_tokens, context),
            max_batch_requests=options.max_batch_requests,
            block_size=options.block_size,
            context=context,
            kv_cache_dtype=options.kv_cache_dtype,
            quantization=options.quantization,
            layouts=chosen_layouts(shapes_of(config), options.quantization) if layouts is None else layouts,
            draft=cls.of(draft, _alone(options), dtype, min(context, draft.max_context)) if draft else None,
        )

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint."""
        return sum(spec.numel for spec in tensor_specs(self.config))

    @property
    def weights(self) -> int:
        """Weights; what is cut is shared out, the rest is held by every card."""
        shards = (Shard(self.cards - 1, self.cards, stage, self.stages) for stage in range(self.stages))  # the largest
        return max(map(self._shard_bytes, shards)) + (self.draft.weights if self.draft else 0)

    def _shard_bytes(self, shard: Shard) -> int:
        return sum(
            layout.nbytes(spec.shape) if layout else spec.numel * ITEMSIZE[self.dtype]
            for spec, layout in shard.held(self.config, self.layouts)
        )

    @property
    def weight_format(self) -> str:
        """What most weights are held in, for people."""
        bits = {layout.bits for layout in self.layouts.values()}
        return f"int{min(bits)}" if bits else self.dtype

    @property
    def kv_dtype(self) -> str:
        """The KV cache's own number format: "bfloat16", "float32" or "int8"."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @property
    def kv_per_token(self) -> int:
        """Keys and values of one token, int8's scales included; beyond one KV head a card, heads are repeated."""
        heads = max(1, self.config.num_key_value_heads // self.cards)
        layers = -(-self.config.num_hidden_layers // self.stages)
        head = self.config.head_dim * _KV_ITEMSIZE[self.kv_dtype] + (_SCALE_BYTES if self.kv_dtype == "int8" else 0)
        return 2 * layers * heads * head + (self.draft.kv_per_token if self.draft else 0)

    @property
    def workspace(self) -> int:
        """Activations of the largest step: the widest point of a layer, a mask, and two copies of the logits."""
        config, itemsize = self.config, ITEMSIZE[self.dtype]
        row = 8 * config.hidden_size + 4 * config.intermediate_size // self.cards
        mask = self.max_batch_tokens * self.context * (1 + itemsize)
        own = self.max_batch_tokens * row * itemsize + mask + 2 * self.max_batch_requests * config.vocab_size * 4
        return max(own, self.draft.workspace if self.draft else 0)  # one model runs after the other

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
                f"{self.weight_format} weights take {gib(self.weights)}, with workspace and the shortest useful KV "
                f"cache {gib(self.least)}, and {gib(limit)} may be used: {self._smallest_change(limit, free)}"
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
        ways = [*self._by_lighter_weights(limit), *self._by_more_cards(limit)]
        return ", or ".join(ways) or "it needs a larger machine; `glm4 plan` shows what fits where"

    def _by_lighter_weights(self, limit: int) -> Iterator[str]:
        """The first quantisation that fits; weights that are stored quantised stay as they are."""
        choices = ("int8", "int4") if self.quantization == "none" and not self.layouts else ()
        for quantization in ("int4",) if self.quantization == "int8" else choices:
            layouts = chosen_layouts(shapes_of(self.config), quantization)
            lighter = replace(self, quantization=quantization, layouts=layouts)
            if lighter.least <= limit:
                yield f"use --quantization {quantization} ({gib(lighter.least)})"
                return

    def _by_more_cards(self, limit: int) -> Iterator[str]:
        for cards in allowed_degrees(self.config)[1:]:
            shared = replace(self, cards=cards, dtype="bfloat16")
            if shared.least <= limit:
                each = gib(shared.least)
                yield (
                    f"share {shared.weight_format} weights among {cards} cards of this size ({each} each): "
                    f"tensor_parallel {cards}"
                )
                return


def _alone(options: EngineOptions) -> EngineOptions:
    """For a model that is not shared: the draft runs on the first card."""
    return replace(options, tensor_parallel=1, pipeline_parallel=1)


def memory_limit(asked: int | float | None, free: int) -> int:
    """Bytes that may be used where `free` are there: as many as `asked`, such a share of them, or all of them."""
    return int(asked * free) if isinstance(asked, float) else min(free, asked or free)


def gib(size: int) -> str:
    """`size` bytes in GiB, for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
