"""How Ray Serve chooses the replica for a request: as `Replicas` does, by what it has to compute."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Sequence
from functools import partial
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from glm4.cluster.affinity import Affinity
from glm4.options import SamplingParams


class AffinityRouter(RequestRouter):
    """For methods whose first arguments are the prompt's token ids and the SamplingParams."""

    def initialize_state(self, **kwargs: Any) -> None:
        """block_size: tokens that a replica's prefix cache keeps together."""
        self._affinity: Affinity[ReplicaID] = Affinity(**kwargs)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica, the best first: where one is full, the next is asked."""
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        self._affinity.keep(by_id.keys())
        prompt, max_new_tokens = _asked(pending_request)
        ranked = self._affinity.rank(prompt, by_id.keys())
        if pending_request is not None and ranked:  # now: others are chosen for before this one is sent
            ticket = pending_request.metadata.internal_request_id
            self._affinity.begin(ticket, prompt, ranked[0], max_new_tokens)
            pending_request.future.add_done_callback(partial(self._forget_if_cancelled, ticket))
        return [[by_id[each]] for each in ranked]

    def _forget_if_cancelled(self, ticket: str, sent: Future[Any]) -> None:
        if sent.cancelled():
            self._affinity.end(ticket)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """`replica_id` has taken the request, be it the first that was asked or not."""
        prompt, max_new_tokens = _asked(pending_request)
        self._affinity.begin(pending_request.metadata.internal_request_id, prompt, replica_id, max_new_tokens)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request has ended, one way or another."""
        self._affinity.end(internal_request_id)


def _asked(request: PendingRequest | None) -> tuple[Sequence[int], int | None]:
    """The token ids of a request's prompt, and the limit of its answer."""
    prompt, sampling = (*(request.args if request is not None else ()), (), None)[:2]
    return prompt, sampling.max_new_tokens if isinstance(sampling, SamplingParams) else None
