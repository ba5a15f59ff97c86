"""The description of the API, as OpenAPI 3.1 and as a page: both derive from what the server reads requests with."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from glm4.api.bodies import NOT_IN_ANSWERS, RENAMED, Json, OpenAIBody
from glm4.options import SamplingParams, option_kind
from glm4.server.errors import KINDS

_JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
_REF = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint, as the description has it."""

    method: str
    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    media_type: str = "application/json"
    """Of its answer."""
    streams: bool = False


class Description:
    """Endpoints that say what the others are."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = operations
        self._document = document(operations)

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document."""
        return JSONResponse(self._document)

    async def docs(self, request: Request) -> Response:
        """A page for people; it fetches nothing."""
        headers = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(_page(self._document), headers=headers)


def document(operations: Sequence[Operation]) -> Json:
    """The OpenAPI document of these operations."""
    bodies = [operation.body for operation in operations if operation.body is not None]
    _, schemas = msgspec.json.schema_components(bodies, ref_template=_REF)
    for body in bodies:
        if issubclass(body, OpenAIBody):
            schemas[body.__name__]["properties"] |= _sampling_properties(schemas[body.__name__]["properties"])
    schemas["Error"] = {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"enum": sorted({*KINDS.values(), "api_error"})},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "integer"},
                },
                "required": ["message", "type"],
            }
        },
        "required": ["error"],
    }
    paths: Json = {}
    for operation in operations:
        paths.setdefault(operation.path.replace(":path", ""), {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "glm4", "version": version("glm4")},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(operation: Operation) -> Json:
    content: Json = {operation.media_type: {}}
    if operation.streams:
        content["text/event-stream"] = {}
    failure = {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}
    described: Json = {
        "operationId": operation.path.strip("/").replace("/", "_").replace("{model:path}", "model"),
        "summary": operation.summary,
        "responses": {
            "200": {"description": "the answer", "content": content},
            "default": {"description": "what is wrong", "content": failure},
        },
    }
    if "{model" in operation.path:
        described["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.body is not None:
        schema = {"$ref": _REF.format(name=operation.body.__name__)}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described


def _sampling_properties(own: Json) -> Json:
    """What our options are called in a request, and what they may be."""
    options = {option.name: option for option in fields(SamplingParams) if option.name not in NOT_IN_ANSWERS}
    named = options | {name: options[ours] for name, ours in RENAMED.items()}
    return {name: _schema(option) for name, option in named.items() if name not in own}


def _schema(option: Field[Any]) -> Json:
    limits, described = option.metadata, {"description": option.metadata["help"]}
    if "parse" in limits:
        return described | {"type": ["object", "null"] if option.name == "logit_bias" else ["object", "string", "null"]}
    one: Json = {"type": _JSON_TYPES[option_kind(option)]}
    one |= {key: limits[limit] for limit, key in _LIMITS.items() if limit in limits}
    if not str(option.type).startswith("tuple"):
        return described | one | {"type": [one["type"], "null"]}
    several: Json = {"type": "array", "items": one}
    return described | ({"anyOf": [several, {"type": ["string", "null"]}]} if option.name == "stop" else several)


_LIMITS = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum"}


def _page(document: Json) -> str:
    sections = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            sections.append(f"<h2>{method.upper()} <code>{html.escape(path)}</code></h2>")
            sections.append(f"<p>{html.escape(operation['summary'])}</p>")
            if "requestBody" in operation:
                ref = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                sections.append(_table(document["components"]["schemas"][ref.rpartition("/")[2]]))
    return _PAGE.format(version=html.escape(document["info"]["version"]), sections="\n".join(sections))


def _table(schema: Json) -> str:
    rows = []
    for name, value in sorted(schema["properties"].items(), key=lambda item: item[0]):
        kind = json.dumps({k: v for k, v in value.items() if k not in ("description", "default")}, ensure_ascii=False)
        mark = " (required)" if name in schema.get("required", ()) else ""
        text = html.escape(value.get("description", "")) + mark
        rows.append(f"<tr><td><code>{html.escape(name)}</code></td><td>{text}</td>")
        rows.append(f"<td><code>{html.escape(kind)}</code></td></tr>")
    return f"<details><summary>request</summary><table>{''.join(rows)}</table></details>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>glm4 API</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
td {{ vertical-align: top; padding: .2rem .8rem .2rem 0; overflow-wrap: anywhere }}
h2 {{ font-size: 1.1rem; margin: 1.5rem 0 0 }} p {{ margin: 0 }}
</style></head><body>
<h1>glm4 {version}</h1>
<p>The same for programs: <a href="openapi.json">openapi.json</a></p>
{sections}
</body></html>
"""
