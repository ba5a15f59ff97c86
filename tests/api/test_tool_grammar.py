"""Answers under a tool grammar: the parser reads what it allows as calls, whose arguments satisfy their schemas."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from glm4.api.answer import AnswerForm, read_answer
from glm4.api.chat import ToolUse
from glm4.structured.grammar import GrammarCompiler, Matcher
from glm4.text.tokenizer import Tokenizer
from glm4.text.tool_calls import NEXT_CALL

DEMO = Path(__file__).parents[2] / "demo" / "glm4-demo"
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["北京", "上海"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"name": "get_weather", "parameters": CITY, "strict": True},
    {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}, "strict": True},
]
ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
SCHEMAS: dict[str, Any] = {tool["name"]: tool["parameters"] for tool in TOOLS}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(str(DEMO))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, [tokenizer.special_tokens[name] for name in ENDS])


def matcher_of(compiler: GrammarCompiler, **tool_use: Any) -> Matcher:
    grammar = ToolUse.of(TOOLS, **tool_use).grammar(None)
    assert grammar is not None
    return compiler.compile(grammar=grammar)


def takes(matcher: Matcher, tokenizer: Tokenizer, text: str) -> bool:
    """Whether `text` is a whole answer; `<|assistant|>` in it is the token."""
    ids: list[int] = []
    for at, piece in enumerate(text.split(NEXT_CALL)):
        ids += [tokenizer.special_tokens[NEXT_CALL]] * (at > 0) + tokenizer.encode_plain(piece)
    if matcher.allowed_drafts(ids) < len(ids):
        return False
    for token_id in ids:
        matcher.accept(token_id)
    return matcher.complete


WEATHER, NOW = 'get_weather\n{"city": "北京"}', "now\n{}"


@pytest.mark.parametrize(
    ("text", "is_taken"),
    [
        (WEATHER, True),
        (f"{WEATHER}{NEXT_CALL}{WEATHER}", True),
        (f"{WEATHER}\n{NOW}{NEXT_CALL}{WEATHER}", True),
        (f"{WEATHER}{NEXT_CALL}", False),
        (f"{NEXT_CALL}{WEATHER}", False),
        (f"{WEATHER}{NEXT_CALL}{NEXT_CALL}{NOW}", False),
        (f"{WEATHER}{NEXT_CALL}你好", False),
        ('get_weather\n{"city": "Paris"}', False),
        ("你好", False),
    ],
)
def test_required_calls(compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, is_taken: bool) -> None:
    assert takes(matcher_of(compiler, choice="required"), tokenizer, text) is is_taken


@pytest.mark.parametrize(
    ("text", "is_taken"),
    [
        ("你好", True),
        (f"我来查一下{NEXT_CALL}{WEATHER}{NEXT_CALL}{NOW}", True),
        (f"我来查一下\n{WEATHER}", True),
        (f"我来查一下{NEXT_CALL}你好", False),
        (f'我来查一下{NEXT_CALL}get_weather\n{{"city": "Paris"}}', False),
    ],
)
def test_strict_calls_after_prose(compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, is_taken: bool) -> None:
    assert takes(matcher_of(compiler), tokenizer, text) is is_taken


def test_a_named_function_may_be_called_several_times(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    assert takes(matcher_of(compiler, choice=("now",)), tokenizer, f"{NOW}{NEXT_CALL}{NOW}")
    assert not takes(matcher_of(compiler, choice=("now",)), tokenizer, f"{NOW}{NEXT_CALL}{WEATHER}")


def test_one_call_where_they_may_not_be_parallel(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    one = {"choice": "required", "parallel": False}
    assert takes(matcher_of(compiler, **one), tokenizer, WEATHER)
    assert not takes(matcher_of(compiler, **one), tokenizer, f"{WEATHER}{NEXT_CALL}{NOW}")


def test_whatever_is_drawn_is_read_as_calls(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    form, most = AnswerForm(tool_names=list(SCHEMAS)), 0
    ends = {tokenizer.special_tokens[name] for name in ENDS}
    for seed in range(30):
        chance, matcher, text = random.Random(seed), matcher_of(compiler, choice="required"), b""
        while True:
            bits = int.from_bytes(matcher.mask(), "little")
            token_id = chance.choice([id for id in range(tokenizer.vocab_size) if bits >> id & 1])
            if token_id in ends:
                break
            matcher.accept(token_id)
            text += tokenizer.token_bytes(token_id, skip_special_tokens=False)
        answer = read_answer(text.decode(), form)
        assert answer.text == "" and answer.calls
        for call in answer.calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        most = max(most, len(answer.calls))
    assert most > 2


def test_quoted_the_token_is_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    quoted = compiler.compile(grammar=f'start: "{NEXT_CALL}"')
    assert quoted.allowed_drafts([tokenizer.special_tokens[NEXT_CALL]]) == 0
    assert quoted.allowed_drafts(tokenizer.encode_plain("<|")) > 0
