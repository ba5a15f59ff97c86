"""The answers of several copies of the model, put together in the order of the prompts."""

from __future__ import annotations

import json
import time
from dataclasses import astuple, dataclass
from datetime import timedelta

from glm4.parallel.world import Place

_INTERVAL = 0.01
_CONNECT = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one prompt."""

    text: str
    tokens: int
    cut: bool
    """It ended at a limit, not by itself."""
    error: str | None
    """Why there is no whole answer."""


def exchange(batch: int, answers: list[Answer], place: Place) -> list[Answer]:
    """The answers of all replicas to the `batch`-th batch, on the first rank; elsewhere only this replica's own.

    answers: this replica's, to every `place.degrees.data`-th prompt from the `place.data_rank`-th on. They travel
    through the store at which the ranks met, which has no time limit: one replica may have longer answers to give.
    """
    replicas = place.degrees.data
    if replicas == 1:
        return answers
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", place.rank, place.world_size, timeout=_CONNECT))
    if place.rank != 0:
        store.set(f"glm4/answers/{batch}/{place.data_rank}", json.dumps([astuple(answer) for answer in answers]))
        return answers
    shares = [answers]
    for replica in range(1, replicas):
        key = f"glm4/answers/{batch}/{replica}"
        while not store.check([key]):
            time.sleep(_INTERVAL)
        shares.append([Answer(*said) for said in json.loads(store.get(key))])
        store.delete_key(key)
    return [shares[i % replicas][i // replicas] for i in range(sum(map(len, shares)))]
