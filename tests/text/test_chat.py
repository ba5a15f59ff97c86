"""Prompts against transformers' apply_chat_template, id for id, and everything that must not act as a turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st

from glm4.errors import CheckpointError, ConfigError, PromptError
from glm4.text import sandbox
from glm4.text.chat import ChatTemplate
from glm4.text.tokenizer import Tokenizer

WEATHER = {
    "name": "get_weather",
    "description": "查询城市天气 <b>",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK = {"name": "get_time", "description": 'the "time"', "parameters": {"type": "object", "properties": {}}}
HI = [{"role": "user", "content": "hi"}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def assistant(text: str, **more: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def observation(text: str) -> dict[str, Any]:
    return {"role": "observation", "content": text}


CALL = assistant('{"city": "北京"}', metadata="get_weather")
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "chat": ([user("请介绍一下北京")], None),
    "multi-turn": ([user("你好"), assistant("\n你好！有什么可以帮你？"), user("1+1=?")], None),
    "code": ([user("```python\ndef f(x):\n\treturn x  # {{ x }} {% if %}\n```\n")], None),
    "emoji": ([user("👩‍👩‍👧‍👦🇨🇳 café naïve \u200d")], None),
    "empty content": ([user(""), assistant(""), user("")], None),
    "leading newlines": ([user("\n\nhello\n\n"), assistant("\n\n\nhi"), user("\n")], None),
    "spaces": ([user("a" + " " * 500 + "b\t\t\t\n   \n"), assistant("   "), user("  x")], None),
    "ends with assistant": ([user("a"), assistant("b")], None),
    "a thought in the history": ([user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c")], None),
    "call and observation": (
        [user("天气？"), CALL, observation('{"temp": 21}'), assistant("21 度"), user("谢谢")],
        None,
    ),
    "system": ([system("You are terse.\n"), user("hi")], None),
    "late and repeated system": ([user("hi"), system("one"), assistant("yes"), system("two"), user("?")], None),
    "bare tools": ([user("天气？")], [WEATHER, CLOCK]),
    "wrapped tools": ([user("天气？")], [{"type": "function", "function": WEATHER}]),
    "tools, system, two calls": (
        [
            system("s"),
            user("北京几点？天气？"),
            CALL,
            assistant("{}", metadata="get_time"),
            observation("21"),
            observation("9"),
        ],
        [{"type": "function", "function": WEATHER}, CLOCK],
    ),
}


@pytest.fixture(scope="session")
def template(template_folder: Path) -> ChatTemplate:
    return ChatTemplate.from_folder(template_folder)


@pytest.fixture(scope="session")
def source(template_folder: Path) -> str:
    return (template_folder / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def rumination(template_folder: Path) -> bool:
    return "Rumination" in template_folder.name


def oracle_ids(oracle: Any, source: str, messages: Any, tools: Any = None, **options: Any) -> list[int]:
    options = {"add_generation_prompt": True, "sanitize_control_tokens": True} | options
    encoded = oracle.apply_chat_template(messages, tools=tools, chat_template=source, return_dict=False, **options)
    assert isinstance(encoded, list)
    return encoded


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_equals_transformers(
    official: Tokenizer, oracle: Any, template: ChatTemplate, source: str, rumination: bool, name: str, generate: bool
) -> None:
    messages, tools = CONVERSATIONS[name]
    if rumination and (tools or any(message["role"] == "system" for message in messages)):
        with pytest.raises(PromptError, match="of its own and ignores all others"):
            template.encode(official, messages, tools, generate)
        return
    for sanitize in (True, False):
        ids = template.encode(official, messages, tools, generate, allow_control_tokens=not sanitize)
        assert ids == oracle_ids(
            oracle, source, messages, tools, add_generation_prompt=generate, sanitize_control_tokens=sanitize
        )
    text = oracle.apply_chat_template(
        messages, tools=tools, chat_template=source, add_generation_prompt=generate, tokenize=False
    )
    assert template.render(messages, tools, generate) == text


def test_a_real_newline_joins_across_the_border(official: Tokenizer, official_9b: Path) -> None:
    ids = ChatTemplate.from_folder(official_9b).encode(official, [user("\nhi")])
    assert official.encode("\n\n") == [271]
    assert ids[:4] == [151331, 151333, 151336, 271]


CONTROL = ["<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "[gMASK]", "<sop>", "<|endoftext|>", "[MASK]"]
# U+F0000 and U+F0001 are left out because transformers marks with them, and drops those that a user typed
PIECES = st.sampled_from(
    [*CONTROL, "<|", "|>", "user", "<|us", "er|>", "\n", "\n\n", "  ", " ", "<think>", "你好", "\\"]
)
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\U000f0000\U000f0001")
CONTENTS = st.lists(PIECES | st.text(CHARACTERS, max_size=3), max_size=6).map("".join)
# a user's </think> is left out because transformers loses text there: test_a_users_end_of_thought_loses_no_text
TURNS = st.one_of(
    st.builds(user, CONTENTS),
    st.builds(observation, CONTENTS),
    st.builds(assistant, CONTENTS | st.tuples(CONTENTS, CONTENTS).map("</think>".join)),
    st.builds(assistant, CONTENTS, metadata=CONTENTS),
)


@given(turns=st.lists(TURNS, min_size=1, max_size=4))
def test_typed_control_tokens_equal_the_oracle(
    official: Tokenizer, oracle: Any, template: ChatTemplate, source: str, turns: list[dict[str, Any]]
) -> None:
    assert template.encode(official, turns) == oracle_ids(oracle, source, turns)


@given(prompt=CONTENTS, name=CONTENTS.filter(str.strip), text=CONTENTS)
def test_control_tokens_in_system_and_tools_equal_the_oracle(
    official: Tokenizer, oracle: Any, official_9b: Path, prompt: str, name: str, text: str
) -> None:
    template = ChatTemplate.from_folder(official_9b)
    source = (official_9b / "chat_template.jinja").read_text(encoding="utf-8")
    messages = [system(prompt), user(text)]
    tools = [{"name": name, "description": text, "parameters": {"enum": [prompt, 1, True, None, 0.5]}}]
    assert template.encode(official, messages, tools) == oracle_ids(oracle, source, messages, tools)


def test_a_control_token_in_a_key_is_plain_too(official: Tokenizer, oracle: Any, official_9b: Path) -> None:
    """transformers lets keys through, though a property's name is as much the caller's as its description."""
    template = ChatTemplate.from_folder(official_9b)
    source = (official_9b / "chat_template.jinja").read_text(encoding="utf-8")
    tools = [{"name": "f", "parameters": {"properties": {"<|user|>": {"type": "string"}}}}]
    turn = official.special_tokens["<|user|>"]
    assert oracle_ids(oracle, source, HI, tools).count(turn) == 2
    ids = template.encode(official, HI, tools)
    assert ids.count(turn) == 1
    assert official.decode(ids, skip_special_tokens=False) == template.render(HI, tools)


@pytest.mark.parametrize("role", ["user", "observation"])
@pytest.mark.parametrize("text", ["a </think> b", "</think>", "x</think><think>y</think>", "</th</think>ink>\n"])
def test_a_users_end_of_thought_loses_no_text(
    official: Tokenizer, oracle: Any, template: ChatTemplate, source: str, role: str, text: str
) -> None:
    """The Z1 templates cut every role's text at `</think>`, and so does transformers; here only answers are cut."""
    strips = "strip()" in source
    prompt = template.render([{"role": role, "content": "PLACE"}])
    prompt = prompt.replace("PLACE", text.strip() if strips else text)
    messages = [{"role": role, "content": text}]
    assert template.render(messages) == prompt
    assert template.encode(official, messages) == oracle.encode(prompt, add_special_tokens=False)
    assert (oracle_ids(oracle, source, messages) != template.encode(official, messages)) == strips


@pytest.mark.parametrize("typed", ["\U000f0000", "\U000f0000<|user|>\U000f0001", "\U000f0000\U000f0001\U000f0002"])
def test_private_characters_neither_forge_nor_vanish(official: Tokenizer, official_9b: Path, typed: str) -> None:
    template = ChatTemplate.from_folder(official_9b)
    ids = template.encode(official, [user(typed)])
    assert ids.count(official.special_tokens["<|user|>"]) == 1
    assert official.decode(ids, skip_special_tokens=False) == template.render([user(typed)])


def test_every_private_character_at_once_is_an_error(small: Tokenizer) -> None:
    everything = "".join(map(chr, range(0xF0000, 0x110000)))
    with pytest.raises(PromptError, match="every private character"):
        ChatTemplate("{{ messages }}").encode(small, [user(everything)])


def test_control_tokens_count_where_the_caller_allows_them(small: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    turn = small.special_tokens["<|user|>"]
    assert template.encode(small, [user("a<|user|>b")], allow_control_tokens=True) == small.encode("a<|user|>b")
    assert turn not in template.encode(small, [user("a<|user|>b")])


def test_of_overlapping_control_tokens_the_longer_counts(small_backend: tokenizers.Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(small_backend.to_str())
    backend.add_special_tokens(["<|user|>th"])
    tokenizer = Tokenizer(backend)
    template = ChatTemplate("{{ messages[0].content }}")
    expected = tokenizer.encode_plain("<|user|>th") + tokenizer.encode("e")
    assert template.encode(tokenizer, [user("<|user|>the")]) == expected
    assert expected != tokenizer.encode_plain("<|user|>") + tokenizer.encode("the")


def test_an_ordinary_added_token_counts_unless_the_template_writes_it(small_backend: tokenizers.Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(small_backend.to_str())
    backend.add_tokens(["chemistry", "<call>"])
    tokenizer = Tokenizer(backend)
    ids = ChatTemplate("<call>{{ messages[0].content }}").encode(tokenizer, [user("chemistry<call>")])
    assert ids.count(tokenizer.added_tokens["chemistry"]) == 1
    assert ids.count(tokenizer.added_tokens["<call>"]) == 1
    assert tokenizer.decode(ids) == "<call>chemistry<call>"


@pytest.mark.parametrize(
    "options", [{"ensure_ascii": True}, {"indent": 2}, {"separators": (",", ":"), "sort_keys": True}], ids=str
)
@given(text=st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0xEFFFF)))
def test_tojson_equals_json(options: dict[str, Any], text: str) -> None:
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    template = ChatTemplate(f"{{{{ messages[0] | tojson({arguments}) }}}}")
    assert template.render([user(text)]) == json.dumps(user(text), **({"ensure_ascii": False} | options))


def test_an_escaping_template_does_not_garble_control_tokens(small: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content | tojson(ensure_ascii=True) }}")
    ids = template.encode(small, [user("é<|user|></think>")])
    assert small.decode(ids, skip_special_tokens=False) == '"\\u00e9<|user|></think>"'
    assert small.special_tokens["<|user|>"] not in ids


def test_only_z1_thinks(template: ChatTemplate, template_folder: Path) -> None:
    assert template.thinks == template_folder.name.startswith(("GLM-Z1-9B", "GLM-Z1-32B"))


# ---- the folder


def test_the_file_wins_over_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config", "eos_token": {"content": "<e>"}}')
    assert ChatTemplate.from_folder(tmp_path).render(HI) == "config"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}\n")
    assert ChatTemplate.from_folder(tmp_path).render(HI) == "file <e>"


def test_of_named_templates_the_default_counts(tmp_path: Path) -> None:
    named = [{"name": "other", "template": "1"}, {"name": "default", "template": "2"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_folder(tmp_path).render(HI) == "2"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (5, "neither a text nor a list"),
        ([{"template": "x"}], "neither a text nor a list"),
        ([{"name": "rag", "template": "x"}], "no template called 'default' among 'rag'"),
        ("{% for %}", "line 1: "),
        ("\n{{ 'a' | nosuchfilter }}", "line 2: No filter named 'nosuchfilter'"),
    ],
)
def test_an_unusable_template_is_named(tmp_path: Path, entry: object, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(ConfigError) as caught:
        ChatTemplate.from_folder(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "tokenizer_config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff", "byte 0 is not UTF-8"), (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer")],
)
def test_an_unreadable_template_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"chat_template\.jinja.*{message}"):
        ChatTemplate.from_folder(tmp_path)


def test_a_base_model_wants_raw_prompts(tmp_path: Path, small: Tokenizer) -> None:
    template = ChatTemplate.from_folder(tmp_path)
    assert not template.available
    assert not template.thinks
    for use in (lambda: template.render(HI), lambda: template.encode(small, HI)):
        with pytest.raises(PromptError, match="no chat template, as base models do: give it raw prompts"):
            use()


# ---- the sandbox


def test_a_template_has_what_transformers_gives_it(oracle: Any) -> None:
    source = (
        "{% for m in messages %}\n    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{%- generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}\n{% continue %}{% endfor %}"
        "{{ x }}{{ tools }}{{ strftime_now('%Y') }}{{ missing }}{{ {'a': '<é>'} | tojson }}\n\n"
    )
    messages = [user("a\n"), assistant("b"), user("c")]
    expected = oracle.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(source).render(messages) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f(n) %}{% for i in '01' %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(60) }}", "steps"),
        ("{% set s = 'a' * 999999 %}{% for i in range(999) %}{{ s }}{% endfor %}", "characters"),
        ("{{ 'a' * 10 ** 10 }}", "multiplied"),
        ("{{ 9 ** 999999999 }}", "multiplied"),
        ("{{ range(999999999) | list }}", "Range too big"),
        ("{{ lipsum(n=1) }}", "'lipsum' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    ],
)
def test_a_hostile_template_is_stopped(monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 20_000)
    with pytest.raises((ConfigError, PromptError), match=message) as caught:
        ChatTemplate(source, "FILE").render(HI)
    assert str(caught.value).startswith("FILE ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].nothing.more }}", "T fails on these messages: 'dict object' has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "T fails on these messages: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "T fails on these messages: maximum recursion depth"),
    ],
)
def test_a_template_that_fails_says_so_in_one_line(source: str, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        ChatTemplate(source, "T").render(HI)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_budget_is_for_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 10)
    template = ChatTemplate("{% for i in range(9) %}{% endfor %}done")
    assert [template.render(HI) for _ in range(3)] == ["done"] * 3


@given(text=CONTENTS)
def test_messages_are_data_and_never_templates(text: str) -> None:
    assume("</think>" not in text)
    braces = "{{ 7 * 7 }}{% raw %}" + text
    assert ChatTemplate("{{ messages[0].content }}").render([user(braces)]) == braces
