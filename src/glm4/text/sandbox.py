"""Chat templates come with a model folder, from anywhere: they run here, in Jinja's sandbox and on a budget.

What a template may use is what Hugging Face's libraries give it: the same whitespace rules, `break` and `continue`,
`{% generation %}`, `tojson` without HTML escapes, `raise_exception` and `strftime_now`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm4.errors import ConfigError, PromptError
from glm4.files import one_line

MAX_STEPS = 1_000_000
"""Loop passes and macro calls of one rendering; the official templates need two for each message."""
MAX_CHARACTERS = 64 * 2**20
"""Length of one rendering."""
MAX_PRODUCT = 2**20
"""Length of a text or list made by `*`, and bits of a number made by `**`."""


def compile_template(source: str, name: str) -> Template:
    """The compiled template; `name` is how messages call it. Raises ConfigError where `source` is no template."""
    try:
        return _Environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{name}: line {error.lineno}: {one_line(error)}; correct the chat template") from error
    except (TemplateError, RecursionError) as error:
        raise ConfigError(f"{name}: {one_line(error)}; correct the chat template") from error


def render_template(template: Template, name: str, variables: dict[str, Any]) -> str:
    """What `template` makes of `variables`, which must be plain JSON values.

    Raises PromptError where the template refuses them or fails on them, and ConfigError where it breaks out of its
    budget or tries what the sandbox forbids.
    """
    pieces, length = [], 0
    try:
        with _budget():
            for piece in template.generate(variables):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_CHARACTERS:
                    raise SecurityError(f"it wrote more than {MAX_CHARACTERS} characters")
    except SecurityError as error:
        raise ConfigError(f"{name} was stopped: {one_line(error)}; use the model's own chat template") from error
    except _Refusal as error:
        raise PromptError(f"the chat template refuses these messages: {one_line(error)}") from error
    except Exception as error:  # the template is a program that came with the folder: anything can go wrong in it
        raise PromptError(f"{name} fails on these messages: {one_line(error)}; check their fields") from error
    return "".join(pieces)


class _Refusal(TemplateError):
    """The template called raise_exception."""


_steps_left: ContextVar[list[int]] = ContextVar("steps_left")


@contextmanager
def _budget() -> Iterator[None]:
    token = _steps_left.set([MAX_STEPS])
    try:
        yield
    finally:
        _steps_left.reset(token)


def _spend() -> None:
    left = _steps_left.get()
    left[0] -= 1
    if left[0] < 0:
        raise SecurityError(f"it took more than {MAX_STEPS} steps")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        del self.globals["lipsum"]  # writes as much as it is asked to

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        repeatable: list[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
        for repeated in repeatable:
            # imported, since a template could give any name of its own another meaning
            call = nodes.Call(nodes.ImportedName(f"{__name__}.{_spend.__name__}"), [], [], None, None)
            repeated.body.insert(0, nodes.ExprStmt(call).set_lineno(repeated.lineno))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if isinstance(repeated, (str, list, tuple)) and isinstance(times, int):
                    _check_size(len(repeated) * times)
        elif isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)


def _check_size(size: int) -> None:
    if size > MAX_PRODUCT:
        raise SecurityError("it multiplied something beyond all need")


class _GenerationTag(Extension):
    """`{% generation %}` marks what the model wrote, for those who train; here its inside is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(lineno)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return re.sub("[^\0-~]", _escape, text) if ensure_ascii else text


def _escape(match: re.Match[str]) -> str:
    # Private-use characters of the last planes stay: they stand for control tokens (chat.py), which an escape would
    # hide from the code that turns them back.
    return match[0] if match[0] >= "\U000f0000" else json.dumps(match[0])[1:-1]


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
