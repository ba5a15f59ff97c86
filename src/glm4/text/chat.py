"""Messages to token ids through the folder's chat template, so that nobody can forge a turn.

A control token that a user types must not act as one. Each is swapped, before the template sees it, for a single
character that occurs nowhere in the input; after rendering, that character is encoded as the token's letters:

    a user's text   say <|user|> twice
    disguised       say ◌ twice
    rendered        [gMASK]<sop><|user|>⏎say ◌ twice<|assistant|>
    encoded         encode("[gMASK]<sop><|user|>⏎say "), encode_plain("<|user|>"), encode(" twice<|assistant|>")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4.errors import ConfigError, Glm4Error, PromptError
from glm4.files import read_bytes, read_json
from glm4.text.messages import Message, normalise_tools
from glm4.text.messages import normalise_messages as normalise_messages
from glm4.text.reasoning import END_THINK, THINK
from glm4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """The chat template of one model folder, which may have none: a base model's.

    `source` is the template's text, `name` how messages call the place it came from, and `variables` what it may
    use beside the messages, such as `bos_token`. Raises ConfigError where `source` is no template.
    """

    def __init__(
        self, source: str | None, name: str = "the chat template", variables: Mapping[str, str] | None = None
    ) -> None:
        self._source = source
        self._name = name
        self._variables = dict(variables or {})
        self._template: Template | None = None
        if source is not None:
            from glm4.text.sandbox import compile_template

            self._template = compile_template(source, name)

    @classmethod
    def from_folder(cls, path: str | Path) -> ChatTemplate:
        """The template of the folder `path`: chat_template.jinja, else the one in tokenizer_config.json, if any.

        Of several named templates in tokenizer_config.json it is the one called "default". Raises ConfigError.
        """
        file, config_file = Path(path) / "chat_template.jinja", Path(path) / "tokenizer_config.json"
        config = read_json(config_file, required=False) or {}
        variables = {key: text for key, value in config.items() if (text := _named_token(key, value)) is not None}
        content = read_bytes(file, required=False)
        if content is None:
            source = _configured_template(config.get("chat_template"), f"{config_file}: chat_template")
            return cls(source, f"{config_file}: chat_template", variables)
        try:
            return cls(content.decode(), str(file), variables)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: byte {error.start} is not UTF-8; download it again") from error

    @property
    def available(self) -> bool:
        """Whether the folder has a template; where it has none, prompts are raw text."""
        return self._template is not None

    @cached_property
    def thinks(self) -> bool:
        """Whether the generation prompt ends in `<think>`, so that an answer begins inside its thought (GLM-Z1)."""
        return self.available and self._render(_PROBE).rstrip().endswith(THINK)

    @cached_property
    def has_own_tools(self) -> bool:
        """Whether the template brings a system prompt with tools of its own, and ignores all others (Rumination)."""
        return self.available and self._ignores_tools and self._ignores_system

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        allow_control_tokens: bool = False,
        thinking: bool = True,
    ) -> list[int]:
        """Token ids of the prompt that `messages` and `tools`, in GLM-4's or OpenAI's shape, make.

        Control tokens inside any of their texts and keys are encoded as plain text, unless `allow_control_tokens`.
        Without `thinking`, an answer that would begin inside a thought (GLM-Z1) finds it empty and ended.
        Raises PromptError where they are malformed or this template cannot use them, or there is no template.
        """
        tokens = [] if allow_control_tokens else self._control_tokens(tokenizer)
        prompt, typed = self._prompt(messages, tools, add_generation_prompt, tokens)
        if add_generation_prompt and not thinking and self.thinks:
            prompt += f"\n{END_THINK}\n"
        ids: list[int] = []
        for piece in typed.split(prompt):
            token = typed.token_of.get(piece)
            ids += tokenizer.encode(piece) if token is None else tokenizer.encode_plain(token)
        return ids

    def render(self, messages: Messages, tools: Tools | None = None, add_generation_prompt: bool = True) -> str:
        """The prompt as text, for reading: control tokens that a user typed look like the template's own in it.

        Raises what `encode` raises.
        """
        return self._prompt(messages, tools, add_generation_prompt, [])[0]

    def _prompt(
        self, messages: Messages, tools: Tools | None, add_generation_prompt: bool, control_tokens: list[str]
    ) -> tuple[str, _Disguise]:
        """The prompt in which every one of `control_tokens` from the input is disguised, and the disguise."""
        chat, functions = normalise_messages(messages), normalise_tools(tools)
        self._refuse_ignored(chat, functions)
        spare = _absent_characters([chat, functions, self._source, self._variables])
        typed, thought = _Disguise(control_tokens, spare), _Disguise([END_THINK], spare)
        chat = typed.apply(chat)
        # GLM-Z1's template keeps only what follows `</think>`: right for an answer, a loss for everybody else's words
        chat = [message if message["role"] == "assistant" else thought.apply(message) for message in chat]
        return thought.undo(self._render(chat, typed.apply(functions), add_generation_prompt)), typed

    def _control_tokens(self, tokenizer: Tokenizer) -> list[str]:
        """Tokens that steer the model: the special ones, and added ones that the template itself writes."""
        source = self._source or ""
        return [
            token
            for token in tokenizer.added_tokens
            if token in tokenizer.special_tokens or (token in source and not token.isspace())
        ]

    def _refuse_ignored(self, messages: list[Message], tools: list[Message]) -> None:
        if tools and self._ignores_tools:
            raise PromptError(
                "tools: this model's chat template has tools of its own and ignores all others; leave them out"
            )
        if self._ignores_system and any(message["role"] == "system" for message in messages):
            raise PromptError(
                "messages: this model's chat template has a system prompt of its own and ignores all others; "
                "leave the system message out, or put its text into the user's"
            )

    @cached_property
    def _ignores_tools(self) -> bool:
        return self._ignores(_PROBE, [{"name": "probe", "description": "probe", "parameters": {}}])

    @cached_property
    def _ignores_system(self) -> bool:
        return self._ignores([{"role": "system", "content": "probe"}, *_PROBE])

    def _ignores(self, messages: list[Message], tools: list[Message] | None = None) -> bool:
        """Whether the probing `messages` and `tools` leave no trace in the prompt, as in GLM-Z1-Rumination's."""
        try:
            return self._render(messages, tools) == self._render(_PROBE)
        except Glm4Error:
            return False  # the template says itself, when it is asked in earnest, what it does not take

    def _render(self, messages: list[Message], tools: list[Message] | None = None, generate: bool = True) -> str:
        if self._template is None:
            raise PromptError("this model has no chat template, as base models do: give it raw prompts, not messages")
        from glm4.text.sandbox import render_template

        variables = {"messages": messages, "tools": tools or None, "add_generation_prompt": generate}
        return render_template(self._template, self._name, {**self._variables, **variables})


_PROBE: list[Message] = [{"role": "user", "content": "probe"}]


class _Disguise:
    """Each of some tokens as one character that stands for it."""

    def __init__(self, tokens: list[str], characters: Iterator[str]) -> None:
        """Takes as many of `characters` as there are `tokens`; PromptError where they run out."""
        self.token_of = dict(zip(islice(characters, len(tokens)), tokens, strict=False))
        if len(self.token_of) < len(tokens):
            raise PromptError("the messages use every private character of Unicode, which leaves none to guard them")
        self._character_of = {token: character for character, token in self.token_of.items()}
        longest_first = sorted(tokens, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or _NEVER)
        self._characters = re.compile(f"([{''.join(self.token_of)}])" if tokens else _NEVER)

    def apply(self, value: Any) -> Any:
        """A copy of `value`, plain JSON, with the tokens in its texts and keys disguised."""
        if isinstance(value, str):
            return self._tokens.sub(lambda match: self._character_of[match[0]], value)
        if isinstance(value, dict):
            return {self.apply(key): self.apply(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.apply(item) for item in value]
        return value

    def split(self, text: str) -> list[str]:
        """`text` cut before and after each disguised token."""
        return self._characters.split(text)

    def undo(self, text: str) -> str:
        """`text` with the tokens in their letters again."""
        return self._characters.sub(lambda match: self.token_of[match[0]], text)


_NEVER = "(?!)"


def _absent_characters(value: Any) -> Iterator[str]:
    """Private characters of Unicode that occur nowhere in `value`, plain JSON: nobody can have typed them."""
    used = set().union(*_texts(value))
    return (character for character in map(chr, range(0xF0000, 0x110000)) if character not in used)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _named_token(key: str, value: Any) -> str | None:
    """The text of an entry such as `eos_token` in tokenizer_config.json, a string or an object; else None."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if key.endswith("_token") and isinstance(text, str) else None


def _configured_template(entry: Any, where: str) -> str | None:
    """The template in tokenizer_config.json: a text, or the one called "default" of a list of named ones."""
    if entry is None or isinstance(entry, str):
        return entry
    try:
        named = {item["name"]: item["template"] for item in entry}
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{where} is neither a text nor a list of named templates; correct it") from error
    if not isinstance(named.get("default"), str):
        raise ConfigError(f"{where} has no template called 'default' among {', '.join(map(repr, named))}; add one")
    return str(named["default"])
