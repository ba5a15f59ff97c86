"""Which blocks of the KV cache are free. The memory itself belongs to the runner."""

from __future__ import annotations


class BlockPool:
    """Hands out block numbers 0 … num_blocks - 1, each to one holder at a time."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # low numbers go out first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """`count` free blocks; the caller has checked `num_free`."""
        return [self._free.pop() for _ in range(count)]

    def give_back(self, block_ids: list[int]) -> None:
        """Make the blocks free again."""
        self._free.extend(reversed(block_ids))
