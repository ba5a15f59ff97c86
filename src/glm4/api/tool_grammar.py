"""Grammars that hold an answer to what its request demands of tool calls and of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from glm4.errors import OptionError
from glm4.structured.grammar import json_schema_rule
from glm4.text.tool_calls import NEXT_CALL

Json = dict[str, Any]


def tool_grammar(
    tools: Sequence[Json], *, forced: bool, parallel: bool, loose: bool = False, answer_schema: Json | None = None
) -> str:
    """A grammar, in Lark's syntax, of answers that may call the functions `tools` (`{"name": …, "parameters": …}`).

    forced: the answer consists of calls, one at least; else it may be prose, or JSON of `answer_schema`, and prose may
    precede the calls. parallel: there may be several. A function's arguments satisfy its parameters, or, with
    `loose`, only where it says strict. Raises OptionError that names a schema which is not supported.
    """
    calls = "call (next call)*" if parallel else "call"
    rules = [_call_rule(at, tool, loose and not tool.get("strict")) for at, tool in enumerate(tools)]
    lines = [f"call: {' | '.join(f'call_{at}' for at in range(len(tools)))}", *rules]
    if parallel:
        lines.append(rf'next: {NEXT_CALL} | "\n"')
    if forced:
        return "\n".join([f"start: {calls}", *lines])
    if answer_schema is not None:
        answer = _rule(answer_schema, "response_format.json_schema.schema")
        return "\n".join([f"start: {calls} | answer", f"answer: {answer}", *lines])
    names = "|".join(_escaped(str(tool["name"])) for tool in tools)
    return "\n".join(
        [
            f"start: LINE* (LAST | (LAST {NEXT_CALL})? {calls})?",
            rf"LINE: /[^\n]*\n/ & ~/[ \t\r]*({names})[ \t\r]*\n/",  # a name on a line of its own begins a call
            r"LAST: /[^\n]+/",
            *lines,
        ]
    )


def _call_rule(at: int, tool: Json, any_object: bool) -> str:
    schema = {"type": "object"} if any_object else tool.get("parameters") or {"type": "object"}
    opening = json.dumps(f"{tool['name']}\n", ensure_ascii=False)
    return f"call_{at}: {opening} {_rule(schema, f'tools[{at}].function.parameters')}"


def _rule(schema: Json, where: str) -> str:
    try:
        return json_schema_rule(schema)
    except OptionError as error:
        raise OptionError(f"{where}: {str(error).removeprefix('json_schema: ')}") from error


def _escaped(name: str) -> str:
    return re.escape(name).replace("/", r"\/")
