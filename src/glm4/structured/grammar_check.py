"""Compiles grammars on trial in a process of its own, so that one that never ends, or needs all memory, harms nobody.

Run as `python -m glm4.structured.grammar_check`. One JSON string a line comes in: a grammar, in Lark syntax or GBNF.
One JSON pair a line goes out: [the grammar in Lark syntax, what is wrong with it or ""].
"""

from __future__ import annotations

import json
import random
import re
import sys
import threading
from collections.abc import Callable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""The library's own limits, but for lexer states (1 to 2 kB each): they stay with a request for as long as it runs."""

EXACT_MASKS = '\n%llguidance {"no_forcing": true}\n'
"""Ends a Lark grammar. Without it, text that the grammar leaves no choice about is allowed in one spelling only."""

_STACK_BYTES = 1 << 20  # far less than any thread of the engine has: what is deep enough to crash that crashes this
_MEMORY_BYTES = 320 << 20  # of address space, of which an idle one takes 160
_TRIAL_BYTES = 200
_GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


def check(grammar: str, bytes_only: LLTokenizer) -> tuple[str, str]:
    """`grammar` in Lark syntax, and what is wrong with it in the library's words, or nothing."""
    try:
        lark = (any_to_lark(grammar) if _GBNF_RULE.search(grammar) else grammar) + EXACT_MASKS
    except RecursionError:
        return grammar, "too deeply nested"
    except Exception as error:  # the library raises nothing narrower
        return grammar, str(error)
    matcher = LLMatcher(bytes_only, lark, log_level=0, limits=LIMITS)
    _walk(matcher, max)  # into strings, and not out of them again
    if not matcher.is_error():
        matcher.reset()
        _walk(matcher, random.Random(0).choice)
    return lark, matcher.get_error()


def _walk(matcher: LLMatcher, choose: Callable[[list[int]], int]) -> None:
    """Say some text, byte by byte: much of a grammar is only compiled when text gets there."""
    for _ in range(_TRIAL_BYTES):
        if matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [byte for byte in range(256) if mask >> byte & 1]
        if not allowed:
            break
        matcher.consume_token(choose(allowed))


def main() -> None:
    """Answer until the other side closes the pipe."""
    bytes_only = LLTokenizer("byte")
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(check(json.loads(line), bytes_only)), flush=True)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system: the limit on time has to do
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


if __name__ == "__main__":
    _limit_memory()
    threading.stack_size(_STACK_BYTES)
    threading.Thread(target=main).start()
