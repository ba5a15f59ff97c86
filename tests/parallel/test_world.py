"""Places in a world of processes, against a table of all of them, and what a launcher may say wrong."""

from __future__ import annotations

import itertools

import pytest

from glm4.errors import OptionError
from glm4.parallel.world import Degrees, Place

DEGREES = [Degrees(*sizes) for sizes in itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2))]


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_places_agree_with_a_table(degrees: Degrees) -> None:
    table = list(
        itertools.product(range(degrees.data), range(degrees.pipeline), range(degrees.tensor))
    )  # by rank: replica, stage, part
    assert degrees.product == len(table)
    for rank, (data, pipeline, tensor) in enumerate(table):
        place = Place(rank, len(table), rank, len(table), degrees)
        assert (place.data_rank, place.pipeline_rank, place.tensor_rank) == (data, pipeline, tensor)
        assert place.tensor_ranks == [r for r, at in enumerate(table) if at[:2] == (data, pipeline)]
        assert place.replica_ranks == [r for r, at in enumerate(table) if at[0] == data]
        assert place.leader == table.index((data, 0, 0))
        assert place.is_leader == (pipeline == tensor == 0)
        assert place.sampler == table.index((data, degrees.pipeline - 1, 0))
        assert place.previous == (table.index((data, pipeline - 1, tensor)) if pipeline else None)
        last = pipeline == degrees.pipeline - 1
        assert place.next == (None if last else table.index((data, pipeline + 1, tensor)))


def environment(rank: object = 5, world: object = 8, local: object = 1, local_size: object = 4) -> dict[str, str]:
    said = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": local_size}
    return {name: str(value) for name, value in said.items() if value is not None}


def test_what_a_launcher_says() -> None:
    place = Place.from_environment(Degrees(2, 2, 2), environment())
    assert place == Place(5, 8, 1, 4, Degrees(2, 2, 2))
    assert place.machine_ranks == [4, 5, 6, 7]
    assert Place.from_environment(Degrees(), {}) == Place()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (environment(world=None), "WORLD_SIZE is not: start"),
        (environment(local="one"), "LOCAL_RANK='one' is not a whole number"),
        (environment(rank="-1"), "RANK='-1' is not a whole number"),
        (environment(rank="٣"), "is not a whole number"),
        (environment(rank=8), "RANK=8 is not below WORLD_SIZE=8"),
        (environment(local=4), "LOCAL_RANK=4 is not below LOCAL_WORLD_SIZE=4"),
        (environment(rank=0), "number the ranks of a machine in a row"),
        (environment(rank=6), "number the ranks of a machine in a row"),
        (environment(3, 4, 3, 4), "4 processes for tensor_parallel 2 x pipeline_parallel 2 x data_parallel 2 = 8"),
        ({}, "1 process for"),
    ],
)
def test_what_a_launcher_may_not_say(said: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Place.from_environment(Degrees(2, 2, 2), said)
    assert message in str(caught.value) and "\n" not in str(caught.value)
