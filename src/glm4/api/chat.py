"""What any of the chat APIs asks for, in one shape: their requests become a ChatRequest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glm4.api.answer import AnswerForm
from glm4.api.tool_grammar import tool_grammar
from glm4.errors import OptionError
from glm4.options import SamplingParams
from glm4.text.messages import normalise_tools

Json = dict[str, Any]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
"""How long a model is to think, in OpenAI's words."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which functions a model may call, and how."""

    functions: list[Json] = field(default_factory=list)
    """Each `{"name": …, "description": …, "parameters": …, "strict": …}`, of which only the name must be there."""
    choice: Literal["none", "auto", "required"] | tuple[str] = "auto"
    """"required": it must call one; a tuple: the one with this name."""
    parallel: bool = True
    """It may call several in one turn."""

    @classmethod
    def of(
        cls, tools: Sequence[Mapping[str, Any]] | None, choice: Any = "auto", parallel: bool | None = True
    ) -> ToolUse:
        """From tools as `normalise_tools` takes them. Raises PromptError and OptionError."""
        functions = [tool.get("function") or tool for tool in normalise_tools(tools)]
        names = [function["name"] for function in functions]
        for index, name in enumerate(names):
            if name.split("\n") != [name.strip()]:
                raise OptionError(f"tools[{index}]: the name {name!r} must be one line without space around it")
        if choice not in ("none", "auto") and not functions:
            raise OptionError("tool_choice: there are no tools to choose from; give some in tools")
        if isinstance(choice, tuple) and choice[0] not in names:
            raise OptionError(f"tool_choice: {choice[0]!r} is none of the tools: {', '.join(names)}")
        if len(set(names)) < len(names):
            raise OptionError("tools: two have the same name; give each function its own")
        return cls(functions, choice, parallel is not False)

    @property
    def shown(self) -> list[Json]:
        """What the model is told of them: nothing where it may call none."""
        if self.choice == "none":
            return []
        return [{"type": "function", "function": _without_strict(function)} for function in self.functions]

    def grammar(self, answer_schema: Json | None) -> str | None:
        """What holds an answer to these rules, where any does; `answer_schema`: prose is JSON of it."""
        if not self.shown:
            return None
        named = self.choice[0] if isinstance(self.choice, tuple) else None
        forced = named is not None or self.choice == "required"
        strict = any(function.get("strict") for function in self.functions)
        if not (forced or strict or answer_schema is not None or not self.parallel):
            return None
        functions = [function for function in self.functions if named in (None, function["name"])]
        return tool_grammar(
            functions, forced=forced, parallel=self.parallel, loose=not forced, answer_schema=answer_schema
        )


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request for the next answer in a conversation."""

    messages: list[Json]
    """As `normalise_messages` takes them."""
    tools: ToolUse
    sampling: SamplingParams
    thinking: bool | None = None
    """False: a model that would begin with a thought (GLM-Z1) answers at once; True: it must be one that thinks."""
    answer_schema: Json | None = None
    """A JSON schema of the answer's text."""

    def constrained(self, has_own_tools: bool) -> SamplingParams:
        """The sampling with the grammar that tools and schema ask for. Raises OptionError."""
        sampling, grammar = self.sampling, self.tools.grammar(self.answer_schema)
        if self.tools.shown or has_own_tools:
            sampling = replace(sampling, skip_special_tokens=False)  # one of them stands between two calls
        if grammar is not None:
            return replace(sampling, grammar=grammar)
        if self.answer_schema is not None:
            return replace(sampling, json_schema=json.dumps(self.answer_schema))
        return sampling

    def form(self, thinks: bool, has_own_tools: bool) -> AnswerForm:
        """How to read the answers of a model that `thinks`, or has tools of its own."""
        names = [function["name"] for function in self.tools.functions] if self.tools.shown else []
        return AnswerForm(thinks and self.thinking is not False, names, has_own_tools)


def thinking_of(effort: Effort | None, key: str) -> bool | None:
    """Whether a model is to think; None where nothing is said.

    Raises OptionError for a length of thought, which cannot be set; `key`: what the request calls it.
    """
    if effort not in (None, "none", "medium"):
        raise OptionError(
            f"{key}: {effort!r} is not supported, for how long a GLM-Z1 thinks cannot be set: use 'medium', which is "
            "its own way, or 'none'"
        )
    return None if effort is None else effort != "none"


def _without_strict(function: Json) -> Json:
    return {key: value for key, value in function.items() if key != "strict"}
