"""The messages and tools a caller may hand in, checked, and brought to the shapes that GLM-4's templates know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glm4.errors import PromptError
from glm4.options import nearest

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "observation": "observation",
    "tool": "observation",
}
"""Every role that is understood, and the role of GLM-4 that it becomes."""

Message = dict[str, Any]

MAX_DEPTH = 64
"""Objects and lists inside each other, in one message or tool."""


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """`messages`, in GLM-4's or OpenAI's shape, as GLM-4's templates know them: role, content and metadata.

    Roles are mapped by ROLES; a list of text parts becomes one text; each of an assistant's `tool_calls` becomes a
    message of its own, with the function's name as `metadata` and the JSON of its arguments as content. Other keys
    are kept, those whose value is None left out. What comes out goes through unchanged a second time.

    Raises PromptError that names the message's index and what is wrong with it.
    """
    plain = _objects(messages, "messages", "messages")
    if not plain:
        raise PromptError("messages: the list is empty; give at least one message")
    return [part for index, message in enumerate(plain) for part in _normalise(message, f"messages[{index}]")]


def normalise_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """`tools` as plain dicts, each either `{"name": …}` or OpenAI's `{"type": "function", "function": {"name": …}}`.

    Raises PromptError that names the tool's index and what is wrong with it.
    """
    plain = _objects([] if tools is None else tools, "tools", "functions")
    for index, tool in enumerate(plain):
        _function(tool, f"tools[{index}]")
    return plain


def _normalise(message: Message, where: str) -> list[Message]:
    rest = {key: value for key, value in message.items() if value is not None}
    role = _role(rest.pop("role", None), where)
    calls = rest.pop("tool_calls", [])
    content = rest.pop("content", None)
    if not isinstance(calls, list):
        raise PromptError(f"{where}: tool_calls is {_kind(calls)}, not a list")
    if calls and role != "assistant":
        raise PromptError(f"{where}: tool_calls belong to an assistant message, not to one of role {role!r}")
    if not isinstance(rest.get("metadata", ""), str):
        raise PromptError(f"{where}: metadata is {_kind(rest['metadata'])}, not the name of a function")
    if content is None and calls:
        content = ""
    spoken = {**rest, "role": role, "content": _text(content, where)}
    called = [_call_message(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return [spoken, *called] if spoken["content"] or not calls else called


def _role(role: object, where: str) -> str:
    if role is None:
        raise PromptError(f"{where}: no role; give one of {', '.join(ROLES)}")
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f"{where}: unknown role {role!r}{nearest(str(role), ROLES)}")
    return ROLES[role]


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise PromptError(f"{where}: no content; give a text, which may be empty")
    if not isinstance(content, list):
        raise PromptError(f"{where}: content is {_kind(content)}, not text")
    return "".join(_part_text(part, f"{where}.content[{index}]") for index, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    if not isinstance(part, dict) or kind != "text":
        raise PromptError(f"{where}: {kind!r} is not text, and GLM-4 reads only {{'type': 'text', 'text': …}}")
    text = part.get("text")
    if not isinstance(text, str):
        raise PromptError(f"{where}: text is {_kind(text)}, not text")
    return text


def _call_message(call: object, where: str) -> Message:
    function = _function(call, where)
    arguments = function.get("arguments", {})
    content = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"role": "assistant", "metadata": function["name"], "content": content}


def _function(holder: object, where: str) -> dict[str, Any]:
    """The function that a tool or a call describes, wrapped in "function" or bare; its name is checked."""
    function = (holder.get("function") or holder) if isinstance(holder, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name.strip():
        raise PromptError(f"{where}: no function name; give {{'name': …}} or {{'function': {{'name': …}}}}")
    return function


def _objects(items: object, where: str, what: str) -> list[dict[str, Any]]:
    """`items` as a list of dicts of plain JSON values."""
    if not isinstance(items, (list, tuple)):
        raise PromptError(f"{where}: expected a list of {what}, got {_kind(items)}")
    plain = [_plain_json(item, f"{where}[{index}]") for index, item in enumerate(items)]
    for index, item in enumerate(plain):
        if not isinstance(item, dict):
            raise PromptError(f"{where}[{index}]: expected an object, got {_kind(item)}")
    return plain


def _plain_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` in plain JSON types: a template can call the methods of whatever it is given."""
    if depth > MAX_DEPTH:
        raise PromptError(f"{where}: nested deeper than {MAX_DEPTH}; flatten it")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # the text itself, where str(value) would ask a subclass, such as an enum
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise PromptError(f"{where}: key {key!r} is {_kind(key)}, not text")
        return {str.__str__(key): _plain_json(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_json(item, where, depth + 1) for item in value]
    raise PromptError(f"{where}: holds {_kind(value)}, which JSON does not have; convert it first")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
