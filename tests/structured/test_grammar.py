"""Masks against brute force, and what comes out of them against jsonschema, re and recognisers written here."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from language import BYTES, Language

from glm4.errors import EngineError, OptionError
from glm4.structured.grammar import GrammarCompiler, Matcher
from glm4.text.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------ against brute force

SMALL = Language(
    [b"a", b"b", b"ab", b"ba", b"aab", "北".encode(), b"\xe5", b"\x8c\x97", b"\xe5\x8c", b"\x97", "a北".encode(), b"bb"]
)
LONGEST = 5
TEXTS = ["".join(letters) for n in range(LONGEST + 1) for letters in itertools.product("ab北", repeat=n)]


def regexes() -> st.SearchStrategy[str]:
    atoms = st.sampled_from(["a", "b", "北", "[ab]", "[^a]", "ab", "b北", "[a-b北]"])
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
            st.tuples(inner, st.sampled_from(["?", "{0,2}", "{2}", "{1,2}"])).map(
                lambda pair: f"(?:{pair[0]}){pair[1]}"
            ),
        ),
        max_leaves=4,
    )


def check_against_words(matcher: Matcher, words: Iterable[bytes], data: st.DataObject) -> None:
    """Along one drawn path, every bit of every mask is set if and only if some word goes on that way."""
    words, text = set(words), b""
    while not matcher.finished:
        expected = {id for id, t in enumerate(SMALL.tokens) if any(word.startswith(text + t) for word in words)}
        assert SMALL.allowed(matcher.mask()) == expected | (SMALL.eos if text in words else set())
        if not expected:
            break
        id = data.draw(st.sampled_from(sorted(expected)))
        matcher.accept(id)
        text += SMALL.tokens[id]
    assert text in words


@settings(max_examples=150)
@given(regex=regexes(), data=st.data())
def test_regex_masks_are_exact(regex: str, data: st.DataObject) -> None:
    # [^a] knows more letters than the tokens can spell, so only what it can spell here is a word.
    words = [text.encode() for text in TEXTS if re.fullmatch(regex, text)]
    longer = ["".join(letters) for letters in itertools.product("ab北", repeat=LONGEST + 1)]
    assume(words and not any(re.fullmatch(regex, text) for text in longer))
    assume(_longest(regex) <= LONGEST)
    check_against_words(SMALL.compiler.compile(regex=regex.replace("[^a]", "[b北]")), words, data)


def _longest(regex: str) -> int:
    return max(
        (n for n in range(3 * LONGEST) if re.fullmatch(re.sub(r"\[[^]]*\]|[ab北]", "x", regex), "x" * n)), default=0
    )


@settings(max_examples=60)
@given(choices=st.lists(st.text("ab北", max_size=5), min_size=1, max_size=6), data=st.data())
def test_choice_masks_are_exact(choices: list[str], data: st.DataObject) -> None:
    check_against_words(SMALL.compiler.compile(choice=choices), [choice.encode() for choice in choices], data)


@settings(max_examples=30)
@given(data=st.data())
def test_grammar_masks_are_exact(data: st.DataObject) -> None:
    matcher = SMALL.compiler.compile(grammar='start: "a" start "b" | "北"\n', json_schema=None)
    nested = [b"a" * n + "北".encode() + b"b" * n for n in range(40)]
    text = b""
    for _ in range(12):
        if matcher.finished:
            break
        expected = {id for id, t in enumerate(SMALL.tokens) if any(word.startswith(text + t) for word in nested)}
        assert SMALL.allowed(matcher.mask()) == expected | (SMALL.eos if text in nested else set())
        id = data.draw(st.sampled_from(sorted(expected)))
        matcher.accept(id)
        text += SMALL.tokens[id]


# ------------------------------------------------------------------------------------------------ what comes out of it

_names = st.text('ab北_"\\ ', min_size=1, max_size=4)
_integers = st.integers(-(2**53), 2**53)
_floats = st.builds(lambda digits, power: float(f"{digits}e{power}"), st.integers(-(10**9), 10**9), st.integers(-20, 6))
_leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "number"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-1000, 1000),
        st.integers(0, 5000),
    ),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    st.builds(
        lambda pattern: {"type": "string", "pattern": pattern}, st.sampled_from(["^[a-c]{2}$", "^北(京|海)$", "^x?$"])
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.one_of(st.none(), st.booleans(), _integers, _floats, st.text(max_size=5)), min_size=1, max_size=4),
    ),
    st.builds(lambda value: {"const": value}, st.one_of(st.text(max_size=6), st.lists(_integers, max_size=3))),
)


def _object(properties: dict[str, Any], flags: list[bool]) -> dict[str, Any]:
    required = [name for name, flag in zip(properties, flags, strict=False) if flag]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(items: dict[str, Any], low: int, more: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + more}


schemas = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(_names, inner, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4)),
        st.builds(_array, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)


@settings(max_examples=150)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_json_validates(schema: dict[str, Any], seed: int) -> None:
    text, ended = BYTES.answer(BYTES.compiler.compile(json_schema=schema), random.Random(seed))
    assert ended
    jsonschema.validate(json.loads(text.decode()), schema)


def test_any_json_object_and_a_recursive_schema() -> None:
    tree = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer"},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }
    for seed in range(20):
        matcher = BYTES.compiler.compile(json_schema=json.dumps(tree))
        text, ended = BYTES.answer(matcher, random.Random(seed))
        assert ended
        jsonschema.validate(json.loads(text.decode()), tree)
    anything = BYTES.compiler.compile(json_schema='{"type": "object"}')
    text, ended = BYTES.answer(anything, random.Random(1), 3000)
    assert isinstance(json.loads(text.decode()) if ended else {}, dict) and text.startswith(b"{")


@pytest.mark.parametrize(
    "regex",
    [
        r"\d{3}-\d{4}",
        r"^(北京|上海)+$",
        r"(?i)yes|no",
        r"[^\x00-\x1f]{1,6}",
        r"a/b\n\"?",
        r"(a|ab)(c|bcd)*",
        "x*",
        r"[^@ ]{1,9}@[a-z]+\.com",
    ],
)
def test_regex_matches(regex: str) -> None:
    ended_once = False
    for seed in range(15):
        text, ended = BYTES.answer(BYTES.compiler.compile(regex=regex), random.Random(seed), 300)
        ended_once |= ended
        assert not ended or re.fullmatch(regex, text.decode())
    assert ended_once


@settings(max_examples=50)
@given(
    choices=st.lists(st.text(max_size=8), min_size=1, max_size=8), seed=st.integers(0, 2**32), cut=st.integers(0, 12)
)
def test_choice_is_one_of_them_and_a_cut_one_a_beginning(choices: list[str], seed: int, cut: int) -> None:
    text, ended = BYTES.answer(BYTES.compiler.compile(choice=choices), random.Random(seed))
    assert ended and text.decode() in choices
    text, _ = BYTES.answer(BYTES.compiler.compile(choice=choices), random.Random(seed), cut)
    assert any(choice.encode().startswith(text) for choice in choices)


SUMS = 'start: sum\nsum: term ("+" term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]+/\n'
SUMS_GBNF = 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"\n'


def is_sum(text: str) -> bool:
    """A recogniser by rewriting: a number is a term, a term in brackets too, and so is a sum of terms."""
    text = re.sub(r"[0-9]+", "t", text)
    while True:
        shorter = text.replace("(t)", "t").replace("t+t", "t")
        if shorter == text:
            return text == "t"
        text = shorter


@pytest.mark.parametrize("grammar", [SUMS, SUMS_GBNF], ids=["Lark", "GBNF"])
def test_grammar(grammar: str) -> None:
    finished = 0
    for seed in range(40):
        text, ended = BYTES.answer(BYTES.compiler.compile(grammar=grammar), random.Random(seed), 60)
        words = text.decode()
        finished += ended
        if not ended and not re.search(r"[0-9)]$", words):
            words += "1"
        assert is_sum(words + ")" * (words.count("(") - words.count(")"))), words
        assert not ended or is_sum(text.decode())
    assert finished >= 5


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), None])
def test_usual_ways_of_writing_json_are_allowed(indent: int | str | None, separators: tuple[str, str] | None) -> None:
    value = {"a": [1, {"b": None, "北": [[], {}, [True]]}], "c": "x y"}
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False).encode()
    matcher = BYTES.compiler.compile(json_schema='{"type": "object"}')
    assert matcher.allowed_drafts(list(text)) == len(text)


def test_white_space_comes_to_an_end() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "required": ["a"],
        "x-guidance": {"lenient": True},
    }
    matcher = BYTES.compiler.compile(json_schema=schema)
    matcher.accept(ord("{"))
    for _ in range(1000):
        white = {ord(" "), ord("\n"), ord("\t")} & BYTES.allowed(matcher.mask())
        if not white:
            break
        matcher.accept(min(white))
    else:
        pytest.fail("white space without end is allowed")
    assert BYTES.allowed(matcher.mask()) >= {ord('"')}


# ------------------------------------------------------------------------------------------------------ the machinery


def test_drafts_have_the_masks_they_would_get_one_by_one() -> None:
    text = b'{"a": [1, 2]}'
    matcher, plain = (BYTES.compiler.compile(json_schema='{"type": "object"}') for _ in range(2))
    one_by_one = [plain.mask()]
    for id in text:
        plain.accept(id)
        one_by_one.append(plain.mask())
    assert plain.finished and plain.complete
    assert matcher.mask(list(text)) == b"".join(one_by_one)
    assert matcher.mask() == one_by_one[0], "drafts leave it where it was"
    assert matcher.allowed_drafts([*text[:5], ord("!"), ord("1")]) == 5
    assert matcher.mask([*text[:5], ord("!")])[: 6 * len(one_by_one[0])] == b"".join(one_by_one[:6])


@pytest.mark.parametrize("end", sorted(BYTES.eos))
def test_every_end_of_sequence_ends(end: int) -> None:
    matcher = BYTES.compiler.compile(regex="a+")
    with pytest.raises(EngineError, match=f"token {end} "):
        matcher.accept(end)
    matcher.accept(ord("a"))
    matcher.accept(end)
    assert matcher.finished and matcher.failure is None
    assert BYTES.allowed(matcher.mask()) == BYTES.eos
    matcher.accept(end)  # it was finished: this changes nothing
    assert matcher.finished


def test_one_lead_may_stand_before_the_text() -> None:
    plain = BYTES.compiler.compile(regex="ab")
    matcher = BYTES.compiler.compile(regex="ab", lead_ids=[ord("\n"), ord("b")])
    assert BYTES.allowed(matcher.mask()) == BYTES.allowed(plain.mask()) | {*b"\nb"}
    drafts = [ord("\n"), ord("a"), ord("b")]
    assert matcher.allowed_drafts([*drafts, ord("b")]) == 3
    ahead = plain.mask([ord("a"), ord("b")])
    assert matcher.mask(drafts)[len(plain.mask()) :] == ahead
    matcher.accept(ord("\n"))
    assert matcher.mask() == plain.mask() and not matcher.complete
    without = BYTES.compiler.compile(regex="ab", lead_ids=[ord("\n")])
    without.accept(ord("a"))
    plain.accept(ord("a"))
    assert without.mask() == plain.mask()


def test_a_token_that_is_not_allowed_changes_nothing() -> None:
    matcher = BYTES.compiler.compile(regex="ab")
    before = matcher.mask()
    for id in (ord("b"), BYTES.vocab_size - 1, *BYTES.eos):
        with pytest.raises(EngineError):
            matcher.accept(id)
    assert matcher.mask() == before and matcher.failure is None


def test_masks_side_by_side_are_those_one_by_one() -> None:
    patterns = {7: "[0-9]{4}", 3: "北+", 12: ".*", 4: "yes|no"}
    expected = {id: BYTES.compiler.compile(regex=regex).mask() for id, regex in patterns.items()}
    masks = BYTES.compiler.masks({id: BYTES.compiler.compile(regex=regex) for id, regex in patterns.items()})
    assert dict(masks) == expected
    drafts = BYTES.compiler.masks({3: BYTES.compiler.compile(regex="北+")}, {3: list("北".encode())})
    assert len(drafts[3]) == 4 * len(expected[3]) and drafts[3].startswith(expected[3])


def test_a_dead_end_fails_alone_and_says_so() -> None:
    matcher = BYTES.compiler.compile(grammar='start: "a" tail | "ccc"\ntail: tail "x"')
    matcher.accept(ord("a"))
    assert BYTES.allowed(matcher.mask()) == BYTES.eos
    assert matcher.finished and not matcher.complete
    assert matcher.failure == "no text can satisfy it"


def test_matchers_of_one_schema_do_not_touch_each_other() -> None:
    first, second = (BYTES.compiler.compile(regex="ab") for _ in range(2))
    first.accept(ord("a"))
    assert BYTES.allowed(second.mask()) == {ord("a"), BYTES.tokens.index(b"ab")}


def test_constraints_come_one_at_a_time() -> None:
    with pytest.raises(OptionError, match="not 0 of them"):
        BYTES.compiler.compile()
    with pytest.raises(OptionError, match="not 2 of them"):
        BYTES.compiler.compile(regex="a", choice=("a",))


# -------------------------------------------------------------------------------------------------- the real tokenizer


class Official(Language):
    def __init__(self, folder: Path) -> None:
        tokenizer = Tokenizer.from_folder(folder)
        self.vocab_size, self.eos = 151_552, {151_329, 151_336, 151_338}
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.compiler = GrammarCompiler(tokenizer, self.vocab_size, sorted(self.eos))


@pytest.fixture(scope="module")
def official(official_9b: Path) -> Official:
    return Official(official_9b)


def test_official_json(official: Official) -> None:
    schema = {
        "type": "object",
        "properties": {
            "城市": {"enum": ["北京", "上海", "广州"]},
            "人口": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
            "特色": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
        },
        "required": ["城市", "人口", "特色"],
        "additionalProperties": False,
    }
    for seed in range(8):
        text, ended = official.answer(official.compiler.compile(json_schema=schema), random.Random(seed))
        assert ended
        jsonschema.validate(json.loads(text.decode()), schema)


def test_official_chinese(official: Official) -> None:
    for seed in range(5):
        text, ended = official.answer(official.compiler.compile(regex="[一-龥]{2,4}(省|市)"), random.Random(seed))
        assert ended and re.fullmatch("[一-龥]{2,4}(省|市)", text.decode())
        text, ended = official.answer(official.compiler.compile(choice=["北京市", "北京", "上海"]), random.Random(seed))
        assert ended and text.decode() in ("北京市", "北京", "上海")


def test_official_control_tokens_and_unknown_ids_are_never_allowed(official: Official) -> None:
    matcher = official.compiler.compile(regex=r"(?s:.)*")
    allowed = official.allowed(matcher.mask())
    assert {id for id in allowed if id >= 151_329} == official.eos
    assert len(allowed) > 100_000


def test_official_prefix_is_what_brute_force_says(official: Official) -> None:
    choices = [word.encode() for word in ("北京市", "北京大学", "Beijing", "北京")]
    matcher = official.compiler.compile(choice=[word.decode() for word in choices])
    expected = {id for id, t in enumerate(official.tokens) if t and any(word.startswith(t) for word in choices)}
    assert official.allowed(matcher.mask()) == expected
