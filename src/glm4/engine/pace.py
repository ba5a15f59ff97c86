"""How much of a long prompt one step may take while answers are under way, so that they keep flowing.

A step takes a + b·n seconds for n prompt tokens in it: a is what the answers take by themselves, b what a prompt token
adds. Both are fitted to the last steps, because they drift: with the number of answers, and with the length of the
text that a chunk attends to.
"""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.95
"""Weight of a step relative to the next one; 20 steps or so count."""
_LEAST_CHUNK = 16
_LEAST_SPREAD = 0.02
"""Variance of n, as a share of its mean square, from which on b can be told from a."""


@dataclass(slots=True)
class Pace:
    """Fits the seconds of steps by weighted least squares, and finds the chunk that keeps a step within `stretch`."""

    stretch: float
    """How many times as long a step may take as without prompt tokens."""
    chunk: int = _LEAST_CHUNK
    """Prompt tokens that the next step may take."""
    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_squared: float = 0.0
    _tokens_seconds: float = 0.0
    """Weighted sums over the steps."""

    def learn(self, num_prompt_tokens: int, seconds: float) -> None:
        """Take in one step in which answers were under way."""
        self._weight = _MEMORY * self._weight + 1
        self._tokens = _MEMORY * self._tokens + num_prompt_tokens
        self._seconds = _MEMORY * self._seconds + seconds
        self._tokens_squared = _MEMORY * self._tokens_squared + num_prompt_tokens**2
        self._tokens_seconds = _MEMORY * self._tokens_seconds + num_prompt_tokens * seconds
        if num_prompt_tokens:
            self.chunk = max(_LEAST_CHUNK, self._fitted())

    def _fitted(self) -> int:
        spread = self._weight * self._tokens_squared - self._tokens**2
        if spread < _LEAST_SPREAD * self._weight * self._tokens_squared:
            return self.chunk // 2  # chunks all alike tell nothing, so take another
        slope = (self._weight * self._tokens_seconds - self._tokens * self._seconds) / spread
        base = (self._seconds - slope * self._tokens) / self._weight
        if slope <= 0 or base <= 0:  # noise
            return self.chunk
        return min(2 * self.chunk, int((self.stretch - 1) * base / slope))
