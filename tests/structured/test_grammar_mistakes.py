"""Constraints that are wrong, or would take too much: one line that says so, within bounded time."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from language import BYTES

import glm4.structured.grammar as grammar_module
from glm4.errors import OptionError


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"regex": "ab(c"}, "regex: unclosed group at character 3"),
        ({"regex": r"(a)\1"}, "regex: backreferences are not supported at character 4"),
        ({"regex": r"[^\s\S]"}, "regex: no text can satisfy it"),
        ({"json_schema": '{"type":'}, "json_schema: not JSON: Expecting value at line 1, column 9"),
        ({"json_schema": "[1]"}, "json_schema: a schema is a JSON object, not [1]"),
        ({"json_schema": {"type": "strin"}}, "json_schema: Invalid type: strin"),
        ({"json_schema": {"uniqueItems": True}}, 'json_schema: unsupported keyword "uniqueItems": leave it out'),
        ({"json_schema": {"type": "string", "pattern": "a(b"}}, "json_schema: unclosed group at character 2"),
        ({"json_schema": {"type": "string", "format": "nope"}}, "json_schema: Unknown format: nope"),
        ({"json_schema": {"$ref": "#"}}, "json_schema: no text can satisfy it"),
        ({"json_schema": {"const": 2**53 + 1}}, "json_schema: 9007199254740993 would not be kept"),
        ({"json_schema": {"items": {"enum": ["a", 1.2e-30]}}}, "json_schema: 1.2e-30 would not be kept"),
        ({"json_schema": {"const": float("nan")}}, "json_schema: holds what JSON cannot"),
        ({"grammar": 'start: "a"\nb "c"'}, "grammar: line 2, column 3: Expected token ':'"),
        ({"grammar": 'start: b\nb: "a" tail'}, 'grammar: line 2, column 4: unknown name: "tail"'),
        ({"grammar": 'root ::= "a" tail'}, "grammar: Rule 'tail' not found"),
        ({"grammar": "start: <[*]>"}, "grammar: <…> names a token"),
        ({"grammar": 'start: "a" <|user|>'}, "grammar: <…> names a token"),
        ({"grammar": "start: <|assistant|> <|user|>"}, "grammar: <…> names a token"),
        ({"choice": "abc"}, "choice: give a list of texts"),
        ({"choice": ["\ud800"]}, "choice: not valid Unicode"),
    ],
    ids=str,
)
def test_a_mistake_is_named_in_one_line(constraint: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        BYTES.compiler.compile(**constraint)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_brackets_in_quotes_are_text() -> None:
    for grammar in ('start: "<b>" /[<>]/ // <comment>', 'root ::= "<b>" [^<"]'):
        matcher = BYTES.compiler.compile(grammar=grammar)
        assert BYTES.allowed(matcher.mask()) == {ord("<")}


def _nested(key: str, depth: int) -> str:
    return f'{{"{key}":[' * depth + "{}" + "]}" * depth


def _chain(depth: int, last: dict[str, Any]) -> dict[str, Any]:
    links: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(depth)}
    return {"$defs": links | {f"d{depth}": last}, "$ref": "#/$defs/d0"}


def _rules(depth: int, name: str, define: str, end: str) -> str:
    return "\n".join(f"{name}{i}{define}{name}{i + 1}" for i in range(depth)) + f'\n{name}{depth}{define}"x"{end}\n'


NASTY: dict[str, dict[str, Any]] = {
    "a repetition of a repetition": {"regex": "(a{1,1000}){1,1000}"},
    "three of them": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "in a pattern": {"json_schema": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}},
    "a million bytes of optional letters": {"regex": "a?" * 200_000 + "a" * 200_000},
    "more than a million characters": {"regex": "ab" * 600_000},
    "brackets 100,000 deep": {"regex": "(" * 100_000 + "a" + ")" * 100_000},
    "allOf 5,000 deep": {"json_schema": _nested("allOf", 5000)},
    "anyOf 500 deep": {"json_schema": _nested("anyOf", 500)},
    "anyOf times anyOf": {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"properties": {f"a{i}": {"type": "null"}}}, {"properties": {f"b{i}": {"type": "null"}}}]}
                for i in range(20)
            ]
        }
    },
    "$ref in a circle": {
        "json_schema": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    },
    "allOf in a circle": {
        "json_schema": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"}
    },
    "a chain of 20,000 $ref": {"json_schema": _chain(20_000, {"type": "null"})},
    "a million values": {"json_schema": {"enum": [f"v{i}" for i in range(1_000_000)]}},
    "10,000 properties": {"json_schema": {"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}},
    "a large multiple": {"json_schema": {"type": "integer", "multipleOf": 1_000_000_007}},
    "a chain of 30,000 rules": {"grammar": "start: a0\n" + _rules(30_000, "a", ": ", "")},
    "a chain of 30,000 terminals": {"grammar": "start: A0\n" + _rules(30_000, "A", ": ", "")},
    "a chain of 30,000 GBNF rules": {"grammar": "root ::= a0\n" + _rules(30_000, "a", " ::= ", "")},
    "GBNF brackets 3,000 deep": {"grammar": "root ::= " + "(" * 3000 + '"x"' + ")" * 3000},
    "2**40 letters in a terminal": {
        "grammar": "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "x"'
    },
    "100,000 choices": {"choice": [f"{i:09}" for i in range(100_000)]},
    "a multiple that takes too long": {"json_schema": {"type": "integer", "multipleOf": 1_000_003}},
}


@pytest.mark.parametrize("name", NASTY)
def test_the_pathological_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_SECONDS", 1.0)
    caught: list[BaseException | None] = []

    def compile_it() -> None:
        try:
            BYTES.compiler.compile(**NASTY[name])
            caught.append(None)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=compile_it, daemon=True)
    thread.start()
    thread.join(60)
    assert caught, "it hangs"
    assert isinstance(caught[0], OptionError), caught[0]
    assert "\n" not in str(caught[0]) and len(str(caught[0])) < 300
    assert BYTES.compiler.compile(choice=[name]).mask(), "and the next one is served"
