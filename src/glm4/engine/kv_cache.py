"""Which blocks of the KV cache are held, and which hold what. The memory itself belongs to the runner.

A block whose tokens are all computed can be found again by them: a new request that begins with the same tokens
shares the block instead of computing it. Blocks that nobody holds keep what they hold until they are needed for
something else, the one left alone longest first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

_Key = tuple[int, tuple[int, ...]]
"""What the blocks before hold (the identity of the last of them), and a block's own tokens."""
START = 0


class Holder(Protocol):
    """Who holds blocks for one text, in order."""

    block_ids: list[int]
    num_published: int
    """How many of them are full and can be found by others."""
    identity: int
    """Names what these hold."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of a prompt that is in the cache already."""

    blocks: list[int]
    identity: int
    """Names what they hold, for the blocks that will follow."""
    num_free_beside: int
    """Free blocks that would be left if these were held."""


class BlockPool:
    """Hands out block numbers 0 … num_blocks - 1; several holders may share a block, which nobody writes to then."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """Blocks that nobody holds, the one to take next first."""
        self._block_of: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        self._identity_of: dict[int, int] = {}
        """Names what a block and all before it hold; never used twice, so a stale one finds nothing."""
        self._identities = itertools.count(START + 1)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """`count` blocks to write into; the caller has checked `num_free`. What they held is forgotten."""
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._forget(block)
            self._holders[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more holder for each of `blocks`, which may be free ones that still hold something."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def give_back(self, blocks: list[int]) -> None:
        """One holder fewer. Later blocks are reused before earlier ones: they are of less use to others."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def find_prefix(self, token_ids: list[int]) -> Prefix:
        """The blocks that hold the beginning of `token_ids`, as far as there are any; they are not held for it yet.

        At least one token is left to compute, for it is the last one's logits that are wanted.
        """
        blocks: list[int] = []
        identity = START
        for first in range(0, len(token_ids) - self.block_size, self.block_size):
            block = self._block_of.get((identity, tuple(token_ids[first : first + self.block_size])))
            if block is None:
                break
            blocks.append(block)
            identity = self._identity_of[block]
        num_free = sum(self._holders[block] == 0 for block in blocks)
        return Prefix(blocks, identity, self.num_free - num_free)

    def publish_full(self, holder: Holder, token_ids: list[int], num_computed: int) -> None:
        """Let others find the blocks of `holder` that the first `num_computed` of `token_ids` fill."""
        size = self.block_size
        for number in range(holder.num_published, num_computed // size):
            tokens = token_ids[number * size : (number + 1) * size]
            holder.identity = self.publish(holder.block_ids[number], tokens, holder.identity)
            holder.num_published += 1

    def publish(self, block: int, token_ids: list[int], before: int) -> int:
        """Let a full block be found by its tokens and the identity of what stands before; its own identity."""
        key = (before, tuple(token_ids))
        if key not in self._block_of:
            self._block_of[key], self._key_of[block] = block, key
            self._identity_of[block] = next(self._identities)
        return self._identity_of[self._block_of[key]]

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key], self._identity_of[block]
