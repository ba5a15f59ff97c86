"""The bodies of requests: read strictly, sampling options beside the keys of each API."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import msgspec

from glm4.errors import OptionError
from glm4.options import SamplingParams, nearest
from glm4.text.messages import ROLES

Json = dict[str, Any]
Body = TypeVar("Body", bound=msgspec.Struct)

SAMPLING_NAMES = frozenset(option.name for option in fields(SamplingParams))
RENAMED = dict.fromkeys(["max_tokens", "max_completion_tokens", "max_output_tokens"], "max_new_tokens")
"""OpenAI's names of our options."""
NOT_IN_ANSWERS = frozenset(["prompt_logprobs"])
"""Options whose result has no place in OpenAI's answers."""


MESSAGES_SCHEMA: Json = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": [*ROLES]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                            "required": ["type", "text"],
                        },
                    },
                ]
            },
        },
        "required": ["role", "content"],
    },
}
"""What is said of a conversation in the API's description; `normalise_messages` checks it."""
Messages = Annotated[list[dict[str, Any]], msgspec.Meta(extra_json_schema=MESSAGES_SCHEMA)]


class OpenAIBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Keys that OpenAI's requests share. Those that only name things of its service change no word of an answer."""

    model: str | None = None
    stream: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TextFormat(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """The answer's text may be anything."""


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """It is a JSON object."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Whether the last piece of a stream is the count of tokens."""

    include_usage: bool = False


def decode_json(data: bytes) -> Json:
    """The JSON object in the body of a request. Raises OptionError."""
    try:
        body: Json = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.ValidationError as error:
        raise OptionError(f"the body is no JSON object that can be used: {_lower(str(error))}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"the body is not JSON: {_lower(str(error))}; send UTF-8 that begins with {{") from error
    except RecursionError as error:
        raise OptionError("the body is nested too deeply: flatten it") from error
    return body


def read_body(body: Mapping[str, Any], kind: type[Body], *, sampling: bool = True) -> tuple[Body, Json]:
    """`body` as `kind`, and what it says of our sampling options beside that, by our names.

    Keys whose value is null count as not said. Raises OptionError for an unknown key and a value of the wrong type.
    """
    own = set(kind.__struct_fields__)
    known = own | {*SAMPLING_NAMES, *RENAMED} - NOT_IN_ANSWERS if sampling else own
    said: Json = {}
    values: Json = {}
    for key, value in body.items():
        if key not in known:
            raise OptionError(f"unknown key {key!r}{nearest(key, known)}")
        if value is None:
            continue
        if key in own:
            said[key] = value
            continue
        name = RENAMED.get(key, key)
        if name in values:
            raise OptionError(f"{key}: the limit is said twice; keep one of {', '.join(RENAMED)} and {name}")
        values[name] = value
    return convert(said, kind), values


def convert(said: Mapping[str, Any], kind: type[Body]) -> Body:
    """`said` as `kind`. Raises OptionError, beginning with the key, for a value of the wrong type."""
    try:
        return msgspec.convert(said, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        where = path.removesuffix("`").removeprefix(".")
        if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
            raise OptionError(f"{where}{'.' if where else ''}{missing[1]}: it is missing") from error
        raise OptionError(f"{where}: {_lower(what)}" if where else _lower(what)) from error


def sampling_of(body: Mapping[str, Any], values: Mapping[str, Any]) -> SamplingParams:
    """What `sampling_from_json` makes of `values`; errors call an option what `body` calls it."""
    try:
        return sampling_from_json(values)
    except OptionError as error:
        message = str(error)
        for name, ours in RENAMED.items():
            if name in body:
                message = message.replace(ours, name)
        raise OptionError(message) from error


def sampling_from_json(values: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from values as JSON has them: a text is never taken for a number.

    Raises OptionError for a value of the wrong type or out of range. `values` has no unknown names.
    """
    for option in fields(SamplingParams):
        value = values.get(option.name, ())
        is_list = str(option.type).startswith("tuple") and "parse" not in option.metadata
        if is_list and not isinstance(value, list | tuple) and not (option.name == "stop" and isinstance(value, str)):
            raise OptionError(f"{option.name}: {value!r} is not a list")
    return SamplingParams(**values)


def refuse_unless(body: msgspec.Struct, **no_effect: tuple[Any, ...]) -> None:
    """Raise OptionError for a key with any value but those that ask for what happens anyway."""
    for key, allowed in no_effect.items():
        value = getattr(body, key)
        if value is not None and value not in allowed:
            kept = " or ".join(json.dumps(one) for one in allowed)
            raise OptionError(f"{key} {json.dumps(value, ensure_ascii=False)} is not supported: leave it at {kept}")


def _lower(message: str) -> str:
    return message if message[1:2].isupper() else message[:1].lower() + message[1:]
