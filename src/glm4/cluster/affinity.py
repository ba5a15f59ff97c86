"""Which of several copies of a model gets a request: the one that has the least to compute until it is answered.

That is what the copy has to do already and the part of the prompt that its prefix cache does not hold. So a
conversation stays where it began, until waiting there costs more than computing its beginning again elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Replica = TypeVar("Replica", bound=Hashable)

_ANSWER_TOKENS = 256
"""What an answer is taken to be long, unless its limit is lower."""


@dataclass(frozen=True, slots=True)
class _Open(Generic[Replica]):
    replica: Replica
    tokens: int


class Affinity(Generic[Replica]):
    """What each replica has been sent, and what it has not answered yet."""

    def __init__(self, block_size: int = 16, max_blocks: int = 1 << 16) -> None:
        """block_size: tokens that a prefix cache keeps together; max_blocks: how many are remembered for a replica."""
        self._block_size, self._max_blocks = block_size, max_blocks
        self._sent: dict[Replica, OrderedDict[int, None]] = {}
        """Blocks of prompts, each by a hash of all tokens up to its end; the latest sent are last."""
        self._open: dict[Hashable, _Open[Replica]] = {}

    def load(self, replica: Replica) -> int:
        """Tokens that it has yet to compute, as far as that is known from outside."""
        return sum(each.tokens for each in self._open.values() if each.replica == replica)

    def rank(self, prompt: Sequence[int], replicas: Collection[Replica]) -> list[Replica]:
        """`replicas`, the best for these token ids first; among equals, the one that has been sent least."""
        blocks = self._blocks(prompt)

        def cost(replica: Replica) -> tuple[int, int]:
            held = self._held(replica, blocks) * self._block_size
            return self.load(replica) - held, len(self._sent.get(replica, ()))

        return sorted(replicas, key=cost)

    def begin(self, ticket: Hashable, prompt: Sequence[int], replica: Replica, max_new_tokens: int | None) -> None:
        """Request `ticket` has been sent to `replica`; where that was said before, nothing changes."""
        if ticket in self._open and self._open[ticket].replica == replica:
            return
        blocks = self._blocks(prompt)
        to_compute = len(prompt) - self._held(replica, blocks) * self._block_size
        self._open[ticket] = _Open(replica, to_compute + min(max_new_tokens or _ANSWER_TOKENS, _ANSWER_TOKENS))
        sent = self._sent.setdefault(replica, OrderedDict())
        for block in blocks:
            sent[block] = None
            sent.move_to_end(block)
        while len(sent) > self._max_blocks:
            sent.popitem(last=False)

    def end(self, ticket: Hashable) -> None:
        """Request `ticket`, which may be unknown, has ended."""
        self._open.pop(ticket, None)

    def forget(self, replica: Replica) -> None:
        """`replica` is gone, or has begun anew: its cache holds nothing."""
        self._sent.pop(replica, None)

    def keep(self, replicas: Collection[Replica]) -> None:
        """Forget all but these."""
        for replica in [each for each in self._sent if each not in replicas]:
            self.forget(replica)

    def _blocks(self, prompt: Sequence[int]) -> list[int]:
        hashes, before, size = [], 0, self._block_size
        for end in range(size, len(prompt) + 1, size):
            before = hash((before, *prompt[end - size : end]))
            hashes.append(before)
        return hashes

    def _held(self, replica: Replica, blocks: list[int]) -> int:
        sent = self._sent.get(replica, OrderedDict())
        return next((i for i, block in enumerate(blocks) if block not in sent), len(blocks))
