"""A tokenizer of single bytes and a few pieces, whose masks are sets that brute force can check."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from glm4.structured.grammar import GrammarCompiler, Matcher
from glm4.text.tokenizer import Tokenizer

ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
UNKNOWN = 5
"""Ids at the end of the model's vocabulary that have no token."""


class Language:
    """A tokenizer of the given tokens, its compiler, and masks as sets of ids."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = itertools.count(0x100)
        spelled = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
        vocabulary = {"".join(spelled[byte] for byte in token): id for id, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer, backend.decoder = letters, decoders.ByteLevel()
        backend.add_special_tokens([*ENDS, "<|assistant|>"])
        self.eos = {backend.token_to_id(token) for token in ENDS}
        self.tokens, self.vocab_size = list(tokens), len(tokens) + len(ENDS) + 1 + UNKNOWN
        self.compiler = GrammarCompiler(Tokenizer(backend), self.vocab_size, sorted(self.eos))

    def allowed(self, mask: bytes) -> set[int]:
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        assert len(mask) == (self.vocab_size + 7) // 8 and not bits[self.vocab_size :].any()
        return set(np.flatnonzero(bits).tolist())

    def answer(self, matcher: Matcher, chance: random.Random, max_tokens: int = 4000) -> tuple[bytes, bool]:
        """What a model that takes any allowed token says, and whether it came to an end by itself."""
        text = b""
        for _ in range(max_tokens):
            if matcher.finished:
                return text, True
            allowed = self.allowed(matcher.mask())
            assert matcher.failure is None and allowed
            ends = allowed & self.eos
            assert ends == (self.eos if matcher.complete else set())
            id = chance.choice(sorted(ends if ends and (chance.random() < 0.3 or ends == allowed) else allowed))
            matcher.accept(id)
            text += b"" if id in ends else self.tokens[id]
        return text, matcher.finished


PIECES = ["{", "}", '{"', '":', '",', "true", "null", "12", "  ", "ab", "aa", "((", ")+", "北", "北京", "京，", "\n\n"]
BYTES = Language(
    [*(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in PIECES if len(piece.encode()) > 1)]
)
