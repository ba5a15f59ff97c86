"""Token ids back to text while they come: whole characters only, and never part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from glm4.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one answer, piece by piece; what it has given, put together, is the decode of the whole answer.

    Text ends before the stop string that is completed first (of two completed by the same character, the longer).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped: str | None = None
        """The stop string that was met; nothing comes after it."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` finishes; empty while a character or a possible stop string is incomplete."""
        if self.stopped is not None:
            return ""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(token_id, self._skip_special_tokens)))

    def finish(self) -> str:
        """The text still held when the answer ends; an incomplete character is U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, start, self.stopped = min(found)
            self._held = ""
            return text[:start]
        kept = len(text) - held_length(text, self._stop)
        self._held = text[kept:]
        return text[:kept]


def held_length(text: str, targets: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `targets` (none is whole in it)."""
    targets = tuple(targets)
    longest = min(len(text), max(map(len, targets), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(target.startswith(text[-length:]) for target in targets):
            return length
    return 0
