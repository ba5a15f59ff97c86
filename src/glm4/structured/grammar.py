"""Structured output: answers held to a JSON schema, a regex, a list of choices or a grammar, one token at a time.

A request with a constraint has a Matcher. Before a token is picked, its mask says which tokens keep the text a
beginning of something that the constraint allows; after that the matcher is told the token:

    mask() ──▶ sampler ──▶ accept(token_id) ──▶ finished? ── no ──▶ mask() …

So an answer that ended by itself satisfies its constraint, and one that was cut is a beginning of one that would.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper, regex_to_lark

from glm4.errors import EngineError, OptionError
from glm4.structured.grammar_check import EXACT_MASKS, LIMITS
from glm4.text.tokenizer import Tokenizer
from glm4.text.tool_calls import NEXT_CALL

MAX_CHARACTERS = 1_000_000
"""Longest schema, regex, grammar or list of choices."""
MAX_SECONDS = 2.0
"""Longest that a grammar may take to compile on trial."""

# JSON allows white space without end, and a model can get lost in it: one space, or a new line and its indentation.
_JSON_WHITESPACE = r" |( ?\n[ \t]{0,32})"
_NEWLINE = r'"\n"'
_TRIAL_TOKENS = 8
_COMPILED_KEPT = 8

# What may hold a "<" in a Lark grammar without naming a token: strings, regexes, comments.
_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|//.*|#.*|/(?:\\.|[^/\\\n])+/')
_QUOTED_OR_NEXT_CALL = re.compile(f"{_QUOTED.pattern}|{re.escape(NEXT_CALL)}")


class Matcher:
    """How far one answer has got in its constraint."""

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, eos_token_ids: Sequence[int], lead_ids: Sequence[int] = ()
    ) -> None:
        """`matcher`: at the beginning, and nobody else's; one token of `lead_ids` may stand before the text."""
        self._matcher, self._mask_bytes = matcher, (vocab_size + 7) // 8
        self._eos_token_ids = frozenset(eos_token_ids)
        self._only_eos = _bits(eos_token_ids).to_bytes(self._mask_bytes, "little")
        self._lead_ids = frozenset(lead_ids)
        """Empty as soon as the text has begun."""

    @property
    def finished(self) -> bool:
        """Nothing can follow: the answer is complete, or has failed."""
        return self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """The text so far satisfies the constraint, though more may be able to follow."""
        return self._matcher.is_accepting()

    @property
    def failure(self) -> str | None:
        """Why no further mask can be computed: the grammar met a limit of the library, or led into a dead end."""
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else None

    def mask(self, draft_token_ids: Sequence[int] = ()) -> bytes:
        """Which tokens may come next: one bit for each id of the model's vocabulary, least significant bit first.

        The end-of-sequence ids are among them exactly when the text is complete. With drafts, there is one such mask
        for the next token and one after each draft; those after a draft that is not allowed are of no use.
        It never raises: where it fails only the end of sequence is allowed, and `failure` says why.
        """
        masks = [self._mask_of(self._matcher)]
        if self._lead_ids:
            leads = int.from_bytes(masks[0], "little") | _bits(self._lead_ids)
            masks[0] = leads.to_bytes(self._mask_bytes, "little")
        if draft_token_ids:
            ahead = self._matcher.deep_copy()  # a failure out there need not be one here
            text = draft_token_ids[self._num_leading(draft_token_ids) : self.allowed_drafts(draft_token_ids)]
            masks += [self._mask_of(ahead)] * self._num_leading(draft_token_ids)
            for token_id in text:
                ahead.consume_token(token_id)
                masks.append(self._mask_of(ahead))
            masks += [self._only_eos] * (1 + len(draft_token_ids) - len(masks))
        return b"".join(masks)

    def _mask_of(self, matcher: LLMatcher) -> bytes:
        mask = self._only_eos if matcher.is_stopped() else matcher.compute_bitmask()[: self._mask_bytes]
        return self._only_eos if matcher.is_error() else mask

    def _num_leading(self, token_ids: Sequence[int]) -> int:
        return int(bool(token_ids) and token_ids[0] in self._lead_ids)

    def allowed_drafts(self, draft_token_ids: Sequence[int]) -> int:
        """How many of the drafts, from the first on, may follow the text."""
        if self.finished:
            return 0
        leading = self._num_leading(draft_token_ids)
        return leading + self._matcher.validate_tokens(list(draft_token_ids[leading:]))

    def accept(self, token_id: int) -> None:
        """Go on by one token. Raises EngineError, and stays where it was, where the mask does not allow it."""
        if self.finished and token_id in self._eos_token_ids:
            return
        if self.allowed_drafts([token_id]) == 0:
            raise EngineError(f"token {token_id} cannot follow here: the sampler ignored the mask of the constraint")
        if not self._num_leading([token_id]):
            self._matcher.consume_token(token_id)
        self._lead_ids = frozenset()


class Masks(Mapping[int, bytes]):
    """Masks by request id, computed side by side in threads; taking one waits for it."""

    def __init__(self, futures: Mapping[int, Future[bytes]]) -> None:
        self._futures = futures

    def __getitem__(self, request_id: int) -> bytes:
        return self._futures[request_id].result()

    def __iter__(self) -> Iterator[int]:
        return iter(self._futures)

    def __len__(self) -> int:
        return len(self._futures)


class GrammarCompiler:
    """Makes matchers for one model. Safe to share between threads; nothing is built before the first use."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size`: the model's, which may be larger than the tokenizer's; `eos_token_ids` end an answer."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_token_ids = tuple(id for id in eos_token_ids if id < vocab_size)
        self._checker = _Checker()
        self._compiled = lru_cache(_COMPILED_KEPT)(self._compile)

    def compile(
        self,
        *,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        choice: Sequence[str] = (),
        grammar: str | None = None,
        lead_ids: Sequence[int] = (),
    ) -> Matcher:
        """The matcher of an answer at its beginning; exactly one constraint is given.

        json_schema: a JSON schema, or the text of one; `{"type": "object"}` is any JSON object.
        regex: what the whole answer must match; `\\d` is 0 to 9, `\\w` and `\\s` are Unicode's; no look-around and
            no back-references.
        choice: the texts of which the answer is one.
        grammar: a context-free grammar in Lark's syntax with the rule `start`, or in GBNF with the rule `root`. Of
            the control tokens it may name the one that stands between tool calls, in Lark's syntax.
        lead_ids: tokens of which one may stand before the text, and is no part of it.

        Raises OptionError, naming what is wrong and where, for a constraint that is malformed, uses what is not
        supported, allows no text at all, or takes too much time or memory; it does so within seconds.
        """
        given = {"json_schema": json_schema, "regex": regex, "choice": choice or None, "grammar": grammar}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise OptionError(f"give one of json_schema, regex, choice and grammar, not {len(names)} of them")
        [name] = names
        try:
            text = _TO_GRAMMAR[name](given[name])
            text.encode()
        except RecursionError as error:
            raise OptionError(f"{name}: too deeply nested") from error
        except UnicodeEncodeError as error:
            raise OptionError(f"{name}: not valid Unicode (a lone surrogate)") from error
        return Matcher(self._compiled(name, text).deep_copy(), self._vocab_size, self._eos_token_ids, lead_ids)

    def masks(self, matchers: Mapping[int, Matcher], drafts: Mapping[int, Sequence[int]] | None = None) -> Masks:
        """Start computing the masks of requests, with their drafts if they have any; returns at once.

        No matcher may be used otherwise before its mask has been taken.
        """
        drafts = drafts or {}
        return Masks({id: self._pool.submit(matcher.mask, drafts.get(id, ())) for id, matcher in matchers.items()})

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "grammar-masks")

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        vocabulary = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids[0]))
        return LLTokenizer(vocabulary, eos_token=list(self._eos_token_ids))

    @cached_property
    def _by_length(self) -> list[int]:
        """Bits of the ids that spell text, one number for each length in bytes, the longest first."""
        lengths: defaultdict[int, list[int]] = defaultdict(list)
        for id in range(self._vocab_size):
            lengths[len(self._tokenizer.token_bytes(id))].append(id)
        return [_bits(lengths[length]) for length in sorted(lengths, reverse=True) if length > 0]

    def _compile(self, name: str, text: str) -> LLMatcher:
        if len(text) > MAX_CHARACTERS:
            raise OptionError(f"{name}: {len(text)} characters are too many; at most {MAX_CHARACTERS} are taken")
        # Between two calls stands a token that no text spells: on trial, and in the eyes of what follows, a line's end.
        spelled = _QUOTED_OR_NEXT_CALL.sub(lambda found: _NEWLINE if found[0] == NEXT_CALL else found[0], text)
        lark, error = self._checker.check(spelled)
        if name == "grammar" and ("unknown special token" in error or (not error and "<" in _QUOTED.sub("", lark))):
            raise OptionError("grammar: <…> names a token, and only text can be described: write it in quotes")
        if not error:
            lark = lark if spelled == text else text + EXACT_MASKS
            matcher = LLMatcher(self._vocabulary, lark, log_level=0, limits=LIMITS)
            error = self._try(matcher)
        if error:
            raise OptionError(f"{name}: {_reason(error, show_line=name == 'grammar')}")
        return matcher

    def _try(self, matcher: LLMatcher) -> str:
        """What is wrong, or "": go a few tokens, the longest ones, and see whether their masks can be afforded."""
        for _ in range(_TRIAL_TOKENS):
            if matcher.is_stopped():
                break
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            longest = next((allowed for ids in self._by_length if (allowed := mask & ids)), 0)
            if not longest:
                break
            matcher.consume_token(longest.bit_length() - 1)
        error = matcher.get_error()
        matcher.reset()
        return error


def _bits(ids: Collection[int]) -> int:
    bits = bytearray(max(ids, default=0) // 8 + 1)
    for id in ids:
        bits[id >> 3] |= 1 << (id & 7)
    return int.from_bytes(bits, "little")


class _Vocabulary:
    """What the library asks of a tokenizer. Ids without a token are control tokens to it: no text spells them."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(id, skip_special_tokens=False) for id in range(vocab_size)]
        self.special_token_ids = [*tokenizer.special_tokens.values(), *tokenizer.unknown_ids(vocab_size)]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode_plain(text.decode())


class _Checker:
    """A grammar_check process: started when it is first needed, replaced when a grammar was too much for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def check(self, grammar: str) -> tuple[str, str]:
        """`grammar` in Lark syntax, and what is wrong with it or ""."""
        with self._lock:
            if self._process is None:
                self._process = _start_process()
                weakref.finalize(self, _end, self._process)
            process = self._process
            expired = threading.Event()

            def expire() -> None:
                expired.set()
                process.kill()

            timer = threading.Timer(MAX_SECONDS, expire)
            timer.start()
            answer = _ask(process, json.dumps(grammar))
            timer.cancel()
            timer.join()
            if expired.is_set() or not answer:
                _end(process)
                self._process = None
            if not answer:
                return grammar, "too complex: it takes too much time or memory to compile; simplify it"
            lark, error = json.loads(answer)
            return lark, error


def _start_process() -> subprocess.Popen[str]:
    module = "glm4.structured.grammar_check"
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise EngineError(f"the process that checks grammars does not start: see what `python -m {module}` says")
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError), process:  # closes the pipes, on what it never read
        process.wait()


def _ask(process: subprocess.Popen[str], line: str) -> str:
    """The answer to `line`, or nothing when the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


def json_schema_rule(schema: str | Mapping[str, Any]) -> str:
    """What stands for JSON of `schema` in a grammar in Lark's syntax. Raises OptionError."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise OptionError(
                f"json_schema: not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            ) from error
        except ValueError as error:  # a number with too many digits
            raise OptionError(f"json_schema: not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise OptionError(f"json_schema: a schema is a JSON object, not {json.dumps(schema)[:40]}")
    settings = {"x-guidance": {"whitespace_pattern": _JSON_WHITESPACE}}
    try:
        text = json.dumps({**schema, **settings}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"json_schema: holds what JSON cannot: {error}") from error
    _check_values(schema)
    return "%json " + text


def _check_values(node: Any, exact: bool = False) -> None:
    """Refuse texts that are none, and numbers under const and enum that the library would replace by their neighbours.

    It reads m * 10**e as one product or quotient of doubles, which is exact while both of them are.
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            _check_values(value, exact or key in ("const", "enum"))
    elif isinstance(node, list | tuple):
        for value in node:
            _check_values(value, exact)
    elif isinstance(node, str) and any("\ud800" <= letter <= "\udfff" for letter in node):
        raise OptionError("json_schema: not valid Unicode (a lone surrogate)")
    elif exact and isinstance(node, int | float) and not isinstance(node, bool):
        _, digits, exponent = Decimal(repr(node)).as_tuple()
        if int("".join(map(str, digits))) > 2**53 or abs(int(exponent)) > 22:
            raise OptionError(f"json_schema: {node} would not be kept to its last digit: round it, or use a string")


def _choice_grammar(choices: Sequence[str]) -> str:
    if isinstance(choices, str) or not all(isinstance(text, str) for text in choices):
        raise OptionError("choice: give a list of texts")
    "".join(choices).encode()
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text) for text in choices)


_TO_GRAMMAR: dict[str, Any] = {
    "json_schema": lambda schema: f"start: {json_schema_rule(schema)}",
    "regex": lambda regex: f"start: /{regex_to_lark(regex, use_ascii='d')}/",
    "choice": _choice_grammar,
    "grammar": str,
}


def _reason(error: str, show_line: bool = False) -> str:
    """One line for the user out of the library's message, which may be a listing."""
    if "NoExtension" in error:
        return "no text can satisfy it"
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", error)
    message = error[place.end() :] if place else error
    if "regex parse error:" in message:
        caret = re.search(r"regex parse error:\n    [^\n]*\n( *)\^", message)
        what = re.search(r"\nerror: (.*)", message)
        message = (what[1] if what else "not a regular expression") + (
            f" at character {len(caret[1]) - 3}" if caret else ""
        )
    message = message.split("(in regex): ")[-1].removeprefix("failed to compile JSON schema: ").split("\n")[0].strip()
    message = re.sub(r"^Unimplemented keys: \[(.*)\]$", r"unsupported keyword \1: leave it out", message)
    message = message if len(message) <= 200 else message[:200] + "…"
    return f"line {place[1]}, column {place[2]}: {message}" if place and show_line else message
