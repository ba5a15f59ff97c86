"""Python functions as tools: what a model reads of them, and what their calls give."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import get_json_schema

from glm4.agent.functions import FunctionTool, load_tools
from glm4.errors import OptionError


class Unit(Enum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


@dataclass
class Place:
    name: str
    height: float = 0.0


class Range(TypedDict):
    low: int
    high: int


@dataclass
class Tree:
    children: list[Tree]


def weather(
    city: str,
    days: int,
    share: float,
    exact: bool,
    tags: list[str],
    limits: dict[str, int],
    unit: Literal["C", "F"],
) -> str:
    """Look up the weather.

    It is made up.

    Args:
        city: the city's name,
            in Chinese
        days: how many days
        share: a share
        exact: whether to round
        tags: words
        limits: the highest of each
        unit: Celsius or Fahrenheit
    """
    return f"{city} {days} {share} {exact} {tags} {limits} {unit}"


def everything(
    title: str,
    place: Place,
    count: Annotated[int, msgspec.Meta(ge=1)] = 3,
    unit: Unit = Unit.CELSIUS,
    note: str | None = None,
    when: date | None = None,
    pair: tuple[int, int] = (1, 2),
    between: Range | None = None,
    either: int | str | list[bool] = 0,
    numbers: list[float] = [1.5],  # noqa: B006 - tools are written like that
    loose: Any = None,
) -> dict[str, Any]:
    """Give back what came in."""
    return dict(locals())


def test_schema_is_what_transformers_makes_of_the_same_function() -> None:
    expected = get_json_schema(weather)
    del expected["function"]["return"]  # which OpenAI's shape does not have
    assert FunctionTool.of(weather).spec == expected


def test_schema_of_what_transformers_does_not_take() -> None:
    parameters = FunctionTool.of(everything).spec["function"]["parameters"]
    jsonschema.Draft202012Validator.check_schema(parameters)
    assert parameters["required"] == ["title", "place"]
    place = {"name": {"type": "string"}, "height": {"type": "number", "default": 0.0}}
    assert parameters["properties"] == {
        "title": {"type": "string"},
        "place": {"type": "object", "properties": place, "required": ["name"]},
        "count": {"type": "integer", "minimum": 1, "default": 3},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "when": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "default": None},
        "pair": {
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "prefixItems": [{"type": "integer"}, {"type": "integer"}],
            "items": False,
            "default": (1, 2),
        },
        "between": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"low": {"type": "integer"}, "high": {"type": "integer"}},
                    "required": ["high", "low"],
                },
                {"type": "null"},
            ],
            "default": None,
        },
        "either": {
            "anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "array", "items": {"type": "boolean"}}],
            "default": 0,
        },
        "numbers": {"type": "array", "items": {"type": "number"}},
        "loose": {"default": None},
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.sampled_from([0.5, -2.25]) | st.text(max_size=3)
    | st.sampled_from(["celsius", "fahrenheit"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["name", "height", "low", "high", "x"]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
PARAMETERS = FunctionTool.of(everything).spec["function"]["parameters"]
LIKELY = {"title": st.text(), "place": st.fixed_dictionaries({"name": st.text()})}
OPTIONAL = {name: JSON for name in PARAMETERS["properties"] if name not in (*LIKELY, "when")}


@given(st.fixed_dictionaries(LIKELY, optional=OPTIONAL) | st.dictionaries(st.sampled_from([*LIKELY, *OPTIONAL]), JSON))
def test_arguments_are_taken_where_they_satisfy_the_schema(arguments: dict[str, Any]) -> None:
    fits = jsonschema.Draft202012Validator(PARAMETERS).is_valid(arguments)
    result = json.loads(FunctionTool.of(everything).call(json.dumps(arguments)))
    assert fits == ("error" not in result)
    if fits:  # the same values, JSON's and Python's forms of them apart
        assert {name: result[name] for name in arguments if name not in ("place", "numbers")} == {
            name: value for name, value in arguments.items() if name not in ("place", "numbers")
        }


def test_arguments_reach_the_function_as_the_types_it_names() -> None:
    seen: dict[str, Any] = {}

    def keep(place: Place, unit: Unit, when: date, share: float = 1.0) -> None:
        """Keep them."""
        seen.update(locals())

    call = '{"place": {"name": "北京"}, "unit": "fahrenheit", "when": "2025-04-14"}'
    assert FunctionTool.of(keep).call(call) == "null"
    seen.pop("seen")
    assert seen == {"place": Place("北京"), "unit": Unit.FAHRENHEIT, "when": date(2025, 4, 14), "share": 1.0}


def gives(value: Any) -> Callable[[], Any]:
    def give() -> Any:
        """Give it."""
        if isinstance(value, BaseException):
            raise value
        return value

    return give


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is\n", "as it is\n"),
        ("half \ud800 pair", "half ? pair"),
        ({"城市": ["北京", 1.5, None, True]}, '{"城市": ["北京", 1.5, null, true]}'),
        (Place("西湖", 5.0), '{"name": "西湖", "height": 5.0}'),
        ([Unit.CELSIUS, date(2025, 4, 14), {1: (2,)}], '["celsius", "2025-04-14", {"1": [2]}]'),
        (ValueError("no such city"), '{"error": "ValueError: no such city"}'),
        (ValueError("\udcff"), '{"error": "ValueError: ?"}'),
        (SystemExit(3), '{"error": "SystemExit: 3"}'),
        (object(), '{"error": "TypeError: Encoding objects of type object is unsupported"}'),
    ],
)
def test_results(value: Any, text: str) -> None:
    assert FunctionTool.of(gives(value)).call("{}") == text


def test_ctrl_c_is_no_result() -> None:
    with pytest.raises(KeyboardInterrupt):
        FunctionTool.of(gives(KeyboardInterrupt())).call("{}")


def test_what_a_function_prints_does_not_mix_with_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    def loud() -> str:
        """Print."""
        print("working …")
        return "done"

    assert FunctionTool.of(loud).call("{}") == "done"
    assert capsys.readouterr() == ("", "working …\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ('{"title": "t"}', "wrong arguments: Object missing required field `place`"),
        ('{"title": "t", "place": {"name": "x"}, "size": 1}', "wrong arguments: Object contains unknown field `size`"),
        ('{"title": 1, "place": {"name": "x"}}', "wrong arguments: Expected `str`, got `int` - at `$.title`"),
        ('{"title": "t", "place": {"name": "x"}, "count": 0}', "wrong arguments: Expected `int` >= 1 - at `$.count`"),
        ('["t"]', "wrong arguments: Expected `object`, got `array`"),
        ('{"title": "cut', "the arguments are not valid JSON: Input data was truncated"),
        ("", "the arguments are not valid JSON: Input data was truncated"),
    ],
)
def test_wrong_arguments_are_told_to_the_model(arguments: str, error: str) -> None:
    assert json.loads(FunctionTool.of(everything).call(arguments)) == {"error": error}


@given(st.text() | st.text(alphabet='{}[]",:\\ntitleplace01\ud800'))
def test_no_arguments_are_a_crash(arguments: str) -> None:
    assert "error" in json.loads(FunctionTool.of(everything).call(arguments))


def test_deep_arguments_are_no_crash() -> None:
    deep = '{"title": "t", "place": {"name": "x"}, "loose": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert "error" in json.loads(FunctionTool.of(everything).call(deep))


HEADER = """
from dataclasses import dataclass
from typing import Literal
"""


NAMED = "and arguments in JSON have a name each"
SIMPLE = "use str, int, float, bool, list or dict"
REFUSED = [
    ("def f(x: str): pass", "f: no docstring; say in one what the function does, for the model reads it"),
    ("def f(x): 'Do.'", "f: x has no type hint; add one, such as x: str"),
    ("def f(__x: int): 'Do.'", "f: __x begins with two underscores; choose a name that the model can read"),
    ("def f(*x: int): 'Do.'", f"f: *x: int takes any number of values, {NAMED}"),
    ("def f(**x: int): 'Do.'", f"f: **x: int takes any name, {NAMED}"),
    ("def f(x: int, /): 'Do.'", f"f: x: int can only be given by position, {NAMED}"),
    ("def f(x: complex): 'Do.'", f"f: x has no form in JSON: type <class 'complex'> is not supported; {SIMPLE}"),
    (
        "def f(x: int = print): 'Do.'",
        f"f: x has no form in JSON: Encoding objects of type builtin_function_or_method is unsupported; {SIMPLE}",
    ),
    ("def f(x: 'Nowhere'): 'Do.'", "f: a type hint cannot be read: name 'Nowhere' is not defined; correct it"),
    (
        "@dataclass\nclass T:\n    t: 'list[T]'\ndef f(x: T): 'Do.'",
        "f: x: the type T contains itself, which a tool's schema cannot say; use dict",
    ),
    (
        'def f(x: int):\n    """Do.\n\n    Args:\n        y: what\n    """',
        "f: Args describes 'y', which is no parameter; correct the docstring",
    ),
    ("async def f(): 'Do.'", "f is async, and tools are called one after the other; give a plain function"),
    ("def _f(): 'Do.'", "tools.py defines no public function: write one with type hints and a docstring"),
    ("__all__ = ['f', 'g']\ndef f(): 'Do.'", "tools.py: __all__ names 'g', which is no function there; correct it"),
    ("def f(:", "tools.py: line 4: invalid syntax; correct it"),
    ("def g():\n    1 / 0\ng()", "line 5: ZeroDivisionError: division by zero; the file must run by itself"),
    ("import nowhere", "line 4: ModuleNotFoundError: No module named 'nowhere'; the file must run by itself"),
    ("raise SystemExit(1)", "line 4: SystemExit: 1; the file must run by itself"),
]


@pytest.mark.parametrize(("code", "message"), REFUSED, ids=[code for code, _ in REFUSED])
def test_files_that_cannot_be_tools(code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("tools.py").write_text(HEADER + code, "utf-8")
    with pytest.raises(OptionError) as raised:
        load_tools("tools.py")
    assert str(raised.value).endswith(message)
    assert "tools.py" in str(raised.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(OptionError, match=r"nowhere\.py is no file: give a Python file whose functions are the tools"):
        load_tools("nowhere.py")


def test_the_public_functions_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "helper.py").write_text(
        "def helped(x: int):\n    'Help.'\n    return _twice(x)\n_twice = lambda x: 2 * x\n"
    )
    file = tmp_path / "tools"  # no matter what it is called
    code = """
from __future__ import annotations
from dataclasses import dataclass
from functools import cache
from helper import helped

@dataclass
class Point:
    x: int

def second(point: Point) -> int:
    "Give x."
    return point.x

@cache
def _hidden(): pass

def first() -> int:
    "Help with one."
    return helped(1)

alias = second
"""
    file.write_text(code)
    second, first = load_tools(file)
    assert (second.name, first.name) == ("second", "first")
    assert second.call('{"point": {"x": 5}}') == "5"
    assert first.call("{}") == "2"
    file.write_text(code + "__all__ = ['helped']\n")
    [helped] = load_tools(file)
    assert helped.call('{"x": 4}') == "8"


def test_parameters_may_have_any_other_name() -> None:
    def odd(
        self: int,
        _x: int,
        type: int,
        odd: int,
        holder: int,
        properties: int,
        title: int,
        城市: int,  # noqa: N803
    ) -> list[int]:
        """Give them back."""
        return [self, _x, type, odd, holder, properties, title, 城市]

    tool = FunctionTool.of(odd)
    names = list(tool.spec["function"]["parameters"]["properties"])
    assert names == ["self", "_x", "type", "odd", "holder", "properties", "title", "城市"]
    assert json.loads(tool.call(json.dumps({name: at for at, name in enumerate(names)}))) == list(range(8))


def test_a_docstring_keeps_what_is_not_about_arguments() -> None:
    def documented(x: int, y: str) -> int:
        """Add.

        Args:
            x (int, optional): a number: any
            y:
                a text

        Returns:
            the sum
        """
        return x

    function = FunctionTool.of(documented).spec["function"]
    assert function["description"] == "Add.\n\nReturns:\n    the sum"
    texts = {name: schema["description"] for name, schema in function["parameters"]["properties"].items()}
    assert texts == {"x": "a number: any", "y": "a text"}
