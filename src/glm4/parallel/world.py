"""Where one process stands among those that hold a model together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from glm4.errors import OptionError


@dataclass(frozen=True, slots=True)
class Degrees:
    """In how many parts a model is cut, and how many copies of it there are."""

    tensor: int = 1
    """Ranks that share every matrix."""
    pipeline: int = 1
    """Stages that hold some layers each."""
    data: int = 1
    """Replicas: whole models that answer different requests."""

    @property
    def product(self) -> int:
        """The processes that this takes."""
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, slots=True)
class Place:
    """Where one process stands: rank = (data_rank * pipeline + pipeline_rank) * tensor + tensor_rank.

    So a replica's ranks follow one another, and within it those of a stage. Ranks of one machine follow one another,
    too, as torchrun numbers them. Every list and property below holds ranks of the whole world.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1
    degrees: Degrees = Degrees()

    @property
    def tensor_rank(self) -> int:
        """Place within the ranks that share each matrix of this one's stage."""
        return self.rank % self.degrees.tensor

    @property
    def pipeline_rank(self) -> int:
        """The stage, counted from the embedding."""
        return self.rank // self.degrees.tensor % self.degrees.pipeline

    @property
    def data_rank(self) -> int:
        """The replica."""
        return self.rank // self._replica_size

    @property
    def tensor_ranks(self) -> list[int]:
        """Those that share each matrix with this one, itself included."""
        first = self.rank - self.tensor_rank
        return list(range(first, first + self.degrees.tensor))

    @property
    def replica_ranks(self) -> list[int]:
        """Those of the whole model that this one is a part of."""
        return list(range(self.leader, self.leader + self._replica_size))

    @property
    def leader(self) -> int:
        """The rank of this replica that schedules: its first."""
        return self.data_rank * self._replica_size

    @property
    def sampler(self) -> int:
        """The rank of this replica that has the logits: the first one of its last stage."""
        return self.leader + self._replica_size - self.degrees.tensor

    @property
    def is_leader(self) -> bool:
        return self.rank == self.leader

    @property
    def previous(self) -> int | None:
        """The rank with the same part of the stage before, None in the first stage."""
        return self.rank - self.degrees.tensor if self.pipeline_rank > 0 else None

    @property
    def next(self) -> int | None:
        """The rank with the same part of the stage after, None in the last stage."""
        return self.rank + self.degrees.tensor if self.pipeline_rank < self.degrees.pipeline - 1 else None

    @property
    def machine_ranks(self) -> list[int]:
        """Those that run on this machine."""
        first = self.rank - self.local_rank
        return list(range(first, first + self.local_size))

    @property
    def _replica_size(self) -> int:
        return self.degrees.tensor * self.degrees.pipeline

    @classmethod
    def from_environment(cls, degrees: Degrees, environment: Mapping[str, str] = os.environ) -> Place:
        """What a launcher said in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; alone where RANK is not set.

        Raises OptionError when one of them is missing or malformed, or when there are more or fewer processes than the
        degrees take.
        """
        if "RANK" in environment:
            rank, world_size = _read_pair(environment, "RANK", "WORLD_SIZE")
            local_rank, local_size = _read_pair(environment, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            if not 0 <= rank - local_rank <= world_size - local_size:
                raise OptionError(
                    f"RANK={rank} of WORLD_SIZE={world_size} cannot be LOCAL_RANK={local_rank} of "
                    f"LOCAL_WORLD_SIZE={local_size}: number the ranks of a machine in a row, as torchrun does"
                )
        else:
            rank, world_size, local_rank, local_size = 0, 1, 0, 1
        if world_size != degrees.product:
            raise OptionError(
                f"{world_size} process{'' if world_size == 1 else 'es'} for tensor_parallel {degrees.tensor} x "
                f"pipeline_parallel {degrees.pipeline} x data_parallel {degrees.data} = {degrees.product}: "
                f"start {degrees.product}, or change a degree"
            )
        return cls(rank, world_size, local_rank, local_size, degrees)


def _read_pair(environment: Mapping[str, str], place: str, size: str) -> tuple[int, int]:
    """A place and the number of places, from two variables."""
    numbers = []
    for name in (place, size):
        text = environment.get(name)
        if text is None:
            raise OptionError(f"RANK is set, but {name} is not: start the ranks with glm4 launch or torchrun")
        if not (text.isascii() and text.isdigit()):
            raise OptionError(
                f"{name}={text!r} is not a whole number: start the processes with glm4 launch or torchrun"
            )
        numbers.append(int(text))
    if numbers[0] >= numbers[1]:
        raise OptionError(f"{place}={numbers[0]} is not below {size}={numbers[1]}: places are counted from 0")
    return numbers[0], numbers[1]
