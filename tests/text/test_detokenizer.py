from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from glm4.text.detokenizer import Detokenizer, held_length
from glm4.text.tokenizer import Tokenizer

STOPS = ["ab", "b", "abc", "aab", "the", "he", "h", "e", "\n\n", "京", "<|user|>", "\ufffd"]
FRAGMENTS = ["a", "b", "c", "ab", "the", "th", "e", "\n", "北京", "<|user|>"]  # "the" is one token


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True, stop: tuple[str, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip, stop)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@given(data=st.data(), skip=st.booleans())
def test_pieces_make_the_full_decode(small: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, small.vocab_size + 5)))
    assert "".join(stream(small, ids, skip)) == small.decode(ids, skip)


@given(text=st.text(), skip=st.booleans())
def test_valid_text_comes_in_whole_characters(official: Tokenizer, text: str, skip: bool) -> None:
    ids = official.encode(text)
    pieces = stream(official, ids, skip)
    assert "".join(pieces) == official.decode(ids, skip)
    assert pieces[-1] == ""  # nothing was left incomplete
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_a_character_waits_for_its_last_byte(small: Tokenizer) -> None:
    ids = [small.encode_plain("é")[0], *small.encode_plain("😀")]
    half = ids[0]
    assert [len(small.token_bytes(id)) for id in ids[1:]] == [1, 1, 1, 1]
    assert stream(small, ids[1:]) == ["", "", "", "😀", ""]
    assert stream(small, ids[1:3]) == ["", "", "\ufffd"]
    assert stream(small, [half, small.special_tokens["<|user|>"]], skip=False) == ["", "\ufffd<|user|>", ""]
    assert stream(small, [*ids[1:3], small.special_tokens["<|user|>"], *ids[3:]]) == ["", "", "", "", "😀", ""]


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Brute force: read character by character until some stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    stops=st.lists(st.sampled_from(STOPS), max_size=4).map(tuple),
    skip=st.booleans(),
)
def test_stop_strings_equal_brute_force(small: Tokenizer, text: str, stops: tuple[str, ...], skip: bool) -> None:
    ids = small.encode(text)
    detokenizer = Detokenizer(small, skip, stops)
    given_text = "".join([*map(detokenizer.push, ids), detokenizer.finish()])
    assert (given_text, detokenizer.stopped) == first_stop(small.decode(ids, skip), stops)
    assert detokenizer.finish() == ""


@given(text=st.text(alphabet="ab", max_size=12), targets=st.lists(st.text(alphabet="ab", min_size=1), max_size=3))
def test_only_what_may_become_a_target_is_held(text: str, targets: list[str]) -> None:
    assume(not any(target in text for target in targets))
    suffixes = [text[start:] for start in range(len(text))]
    expected = [len(suffix) for suffix in suffixes if any(target.startswith(suffix) for target in targets)]
    assert held_length(text, targets) == max(expected, default=0)


def test_text_before_a_stop_string_is_not_delayed(small: Tokenizer) -> None:
    detokenizer = Detokenizer(small, stop=("STOP",))
    assert detokenizer.push(small.encode_plain("x")[0]) == "x"
    assert detokenizer.push(small.encode_plain("S")[0]) == ""
    assert detokenizer.push(small.encode_plain("x")[0]) == "Sx"
    assert [detokenizer.push(id) for letter in "STOPx" for id in small.encode_plain(letter)] == [""] * 5
    assert detokenizer.stopped == "STOP"


@pytest.mark.parametrize("count", [1, 3])
def test_a_stop_string_may_be_completed_by_the_end(small: Tokenizer, count: int) -> None:
    ids = small.encode_plain("😀")[:count]
    detokenizer = Detokenizer(small, stop=("\ufffd",))
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == ""
    assert detokenizer.stopped == "\ufffd"
