"""A Python function's signature, type hints and docstring as what a model reads: a JSON schema of its arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import msgspec

from glm4.errors import OptionError

Json = dict[str, Any]

_NO_NAMES = {
    inspect.Parameter.POSITIONAL_ONLY: "can only be given by position",
    inspect.Parameter.VAR_POSITIONAL: "takes any number of values",
    inspect.Parameter.VAR_KEYWORD: "takes any name",
}


@dataclass(frozen=True, slots=True)
class Signature:
    """What a function takes, checked."""

    description: str
    """The docstring without its `Args:`."""
    parameters: Json
    """A JSON schema of one object, without references."""
    arguments: type[msgspec.Struct]
    """One field for each parameter; decodes and validates a call's JSON."""

    @classmethod
    def of(cls, function: Callable[..., Any], where: str) -> Signature:
        """Read `function`.

        Each parameter needs a type hint that JSON has a form for: str, int, float, bool, list[…], dict[str, …],
        `| None`, Literal, an Enum, a dataclass or TypedDict, and what else msgspec knows. What the docstring says under
        `Args:` (`name: text`, as in Google's style) describes the parameters.
        Raises OptionError, which begins with `where`, for what cannot be described.
        """
        description, texts = _read_docstring(inspect.getdoc(function) or "")
        if not description:
            raise OptionError(f"{where}: no docstring; say in one what the function does, for the model reads it")
        parameters = inspect.signature(function).parameters
        for name in texts.keys() - parameters.keys():
            raise OptionError(f"{where}: Args describes {name!r}, which is no parameter; correct the docstring")
        try:
            hints = get_type_hints(function, include_extras=True)
        except Exception as error:  # a hint is any expression
            raise OptionError(f"{where}: a type hint cannot be read: {error}; correct it") from error
        fields = [_field(parameter, hints, texts, where) for parameter in parameters.values()]
        properties = {field[0]: _schema_of(field, f"{where}: {field[0]}") for field in fields}
        required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
        schema = {"type": "object", "properties": properties, "required": required}
        struct = msgspec.defstruct(function.__name__, fields, kw_only=True, forbid_unknown_fields=True)
        return cls(description, schema, struct)


_Field = tuple[str, Any] | tuple[str, Any, Any]
"""As `msgspec.defstruct` takes them: name, type, and a default where there is one."""


def _field(parameter: inspect.Parameter, hints: Mapping[str, Any], texts: Mapping[str, str], where: str) -> _Field:
    name = parameter.name
    if parameter.kind in _NO_NAMES:
        raise OptionError(f"{where}: {parameter} {_NO_NAMES[parameter.kind]}, and arguments in JSON have a name each")
    if name.startswith("__"):  # Python has uses of its own for them
        raise OptionError(f"{where}: {name} begins with two underscores; choose a name that the model can read")
    if name not in hints:
        raise OptionError(f"{where}: {name} has no type hint; add one, such as {name}: str")
    hint = hints[name]
    if name in texts:
        hint = Annotated[hint, msgspec.Meta(description=texts[name])]
    if parameter.default is parameter.empty:
        return name, hint
    if isinstance(parameter.default, (list, dict, set)):  # which msgspec wants made anew for each call
        return name, hint, msgspec.field(default_factory=lambda: parameter.default)
    return name, hint, parameter.default


def _schema_of(field: _Field, where: str) -> Json:
    """The JSON schema of one parameter. Raises OptionError where JSON has no form for its type or default."""
    try:
        holder = msgspec.defstruct("holder", [field])
        (reference,), definitions = msgspec.json.schema_components([holder], ref_template="{name}")
    except (TypeError, RecursionError) as error:
        reason = str(error).splitlines()[-1].rstrip(".")
        raise OptionError(f"{where} has no form in JSON: {reason}; use str, int, float, bool, list or dict") from error
    return _spelled_out(definitions[reference["$ref"]]["properties"][field[0]], definitions, where)


def _spelled_out(schema: Json, definitions: Mapping[str, Json], where: str, within: tuple[str, ...] = ()) -> Json:
    """`schema` with each `$ref` replaced by what it stands for, and its type first: models read that more surely."""
    if "$ref" in schema:
        name = schema["$ref"]
        if name in within:
            raise OptionError(f"{where}: the type {name} contains itself, which a tool's schema cannot say; use dict")
        within = (*within, name)
        meant = {key: value for key, value in definitions[name].items() if key != "title"}
        schema = meant | {key: value for key, value in schema.items() if key != "$ref"}
    if all(isinstance(value, str) for value in schema.get("enum", [0])):
        schema = {"type": "string", **schema}

    def part(value: Any) -> Any:
        return _spelled_out(value, definitions, where, within) if isinstance(value, dict) else value

    parts: dict[str, Callable[[Any], Any]] = {
        "properties": lambda value: {name: part(schema) for name, schema in value.items()},
        "anyOf": lambda value: [part(schema) for schema in value],
        "prefixItems": lambda value: [part(schema) for schema in value],
        "items": part,
        "additionalProperties": part,
    }
    keys = sorted(schema, key=lambda key: key != "type")
    return {key: parts[key](schema[key]) if key in parts else schema[key] for key in keys}


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """(the docstring without its `Args:`, what those say of each parameter)."""
    heading = re.search(r"(?m)^Args:[ \t]*$", text)
    if heading is None:
        return text.strip(), {}
    lines = text[heading.end() :].strip("\n").split("\n")
    end = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), len(lines))
    texts: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc("\n".join(["", *lines[:end]])).split("\n"):
        if entry := re.match(r"(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)", line):
            name, texts[entry[1]] = entry[1], entry[2]
        elif name and line.strip():  # a longer text goes on, further to the right
            texts[name] = f"{texts[name]} {line.strip()}".strip()
    rest = "\n".join(lines[end:])
    return f"{text[: heading.start()].strip()}\n\n{rest.strip()}".strip(), texts
