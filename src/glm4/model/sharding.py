"""Which part of a model a rank holds: some layers, and of each matrix some rows or columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from glm4.errors import OptionError
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.utils import TensorSpec, layer_specs, tensor_specs
from glm4.parallel.world import Place
from glm4.quantization.layout import Cut, Layout

Range = tuple[int, int]


def allowed_degrees(config: Glm4Config) -> list[int]:
    """In how many parts every matrix can be cut: whole heads, KV heads or copies of one, equal parts of the MLP."""
    kv_heads = config.num_key_value_heads
    return [
        degree
        for degree in range(1, config.num_attention_heads + 1)
        if config.num_attention_heads % degree == 0
        and config.intermediate_size % degree == 0
        and (kv_heads % degree == 0 or degree % kv_heads == 0)
    ]


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part; the whole model by default."""

    tensor_rank: int = 0
    tensor_size: int = 1
    pipeline_rank: int = 0
    pipeline_size: int = 1

    @classmethod
    def of(cls, place: Place) -> Shard:
        """The part of the rank that stands at `place`."""
        return cls(place.tensor_rank, place.degrees.tensor, place.pipeline_rank, place.degrees.pipeline)

    def check(self, config: Glm4Config) -> None:
        """Raise OptionError, with what is possible, where the model cannot be cut like this."""
        allowed = allowed_degrees(config)
        if self.tensor_size not in allowed:
            raise OptionError(
                f"tensor_parallel {self.tensor_size} (model_parallel in the YAML) does not divide this model: "
                f"use {' or '.join(map(str, allowed))}"
            )
        if self.pipeline_size > config.num_hidden_layers:
            raise OptionError(
                f"pipeline_parallel {self.pipeline_size} (pipeline_stage in the YAML) is more than the model's "
                f"{config.num_hidden_layers} layers: use fewer"
            )

    @property
    def is_first(self) -> bool:
        """It begins with the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last(self) -> bool:
        """It ends with the head."""
        return self.pipeline_rank == self.pipeline_size - 1

    def layers(self, config: Glm4Config) -> range:
        """The layers of this rank's stage; where they do not divide evenly, the stage with the head has fewer."""
        layers, ends = config.num_hidden_layers, (self.pipeline_rank, self.pipeline_rank + 1)
        return range(*(-(-rank * layers // self.pipeline_size) for rank in ends))

    def specs(self, config: Glm4Config) -> Iterator[TensorSpec]:
        """The weights of which this rank holds something, with the shapes of the whole."""
        ends = {spec.name: spec for spec in tensor_specs(config) if not spec.name.startswith("model.layers.")}
        if self.is_first or (self.is_last and config.tie_word_embeddings):
            yield ends["model.embed_tokens.weight"]
        for layer in self.layers(config):
            yield from layer_specs(config, layer)
        if self.is_last:
            yield from (spec for name, spec in ends.items() if name != "model.embed_tokens.weight")

    def held(self, config: Glm4Config, layouts: Mapping[str, Layout]) -> Iterator[tuple[TensorSpec, Layout | None]]:
        """What this rank holds of each weight: the shape of its part, and how it is held where it is quantised.

        layouts: how the whole is held. Of the ranks that share each matrix, none holds more than the last.
        """
        cuts = self.cuts(config, layouts)
        for spec in self.specs(config):
            layout, cut = layouts.get(spec.name), cuts.get(spec.name)
            if cut is None:
                yield spec, layout
                continue
            if layout is not None:
                layout = replace(layout, group_size=cut.group_size(layout.group_size, spec.shape[1]))
            yield replace(spec, shape=cut.shape(spec.shape)), layout

    def num_kv_heads(self, config: Glm4Config) -> int:
        """KV heads on this rank: beyond one a rank, heads are repeated."""
        return max(1, config.num_key_value_heads // self.tensor_size)

    def vocabulary(self, config: Glm4Config, rank: int | None = None) -> Range:
        """Rows of the embedding and the head on this rank, or on tensor rank `rank`."""
        return _part(config.vocab_size, self.tensor_rank if rank is None else rank, self.tensor_size)

    def cuts(self, config: Glm4Config, layouts: Mapping[str, Layout]) -> dict[str, Cut]:
        """What this rank holds of each weight that is cut, by name; empty for a model in one piece.

        layouts: how weights are held that are quantised: down_proj is cut between its groups, gate and up where it is.
        """
        if self.tensor_size == 1:
            return {}
        return {
            spec.name: Cut(spec.shard_axis, self._ranges(spec.name, config, layouts))
            for spec in self.specs(config)
            if spec.shard_axis is not None
        }

    def _ranges(self, name: str, config: Glm4Config, layouts: Mapping[str, Layout]) -> tuple[Range, ...]:
        rank, size, head_dim = self.tensor_rank, self.tensor_size, config.head_dim
        module = name.rpartition(".")[0]
        if module in ("model.embed_tokens", "lm_head"):
            return (self.vocabulary(config),)
        if module.endswith(("k_proj", "v_proj")):
            first = rank * config.num_key_value_heads // size
            return ((first * head_dim, (first + self.num_kv_heads(config)) * head_dim),)
        if module.endswith(("q_proj", "o_proj")):
            return (_part(config.num_attention_heads * head_dim, rank, size),)
        layer = module.rpartition(".")[0]
        first, end = self._intermediate(config.intermediate_size, layouts.get(f"{layer}.down_proj.weight"))
        if module.endswith("down_proj"):
            return ((first, end),)
        return ((first, end), (config.intermediate_size + first, config.intermediate_size + end))

    def _intermediate(self, size: int, layout: Layout | None) -> Range:
        """Groups that share a scale stay whole if there are enough of them, and numbers that share a byte always."""
        group, in_a_byte = (layout.group_size, 8 // layout.bits) if layout is not None else (size, 1)
        unit = group if self.tensor_size <= size // group else in_a_byte
        first, end = _part(size // unit, self.tensor_rank, self.tensor_size)
        return first * unit, end * unit


WHOLE = Shard()
"""The part of a rank that is alone."""


def _part(size: int, rank: int, ranks: int) -> Range:
    """As even as can be; no part is larger than the last."""
    return rank * size // ranks, (rank + 1) * size // ranks
