"""`glm4 chat --tools`: calls are asked about, made, shown and given back, until there is an answer."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from programs import REPOSITORY, Bench, Ran
from terminal import CTRL_C, CTRL_D, Terminal

from glm4.agent.functions import FunctionTool
from glm4.cli.toolbox import Toolbox, printable
from glm4.engine.llm import LLM
from glm4.engine.request import RequestOutput
from glm4.options import SamplingParams
from glm4.text.tool_calls import ToolCall

DEMO = REPOSITORY / "demo" / "glm4-demo"
EXAMPLE = REPOSITORY / "examples" / "agent" / "tools.py"
Json = dict[str, Any]

TOOLS = '''
def get_weather(city: str, days: int = 1) -> dict:
    """Look up the weather."""
    if city == "nowhere":
        raise LookupError("no such city")
    return {"city": city, "degrees": 20 + days}

def read(path: str) -> str:
    """Read a file."""
    return "x" * 5000

def rest() -> None:
    """Do nothing until Ctrl-C."""
    raise KeyboardInterrupt
'''


@pytest.fixture
def bench(bench: Bench) -> Bench:
    """A model whose chat template has a place for tools."""
    shutil.copy(DEMO / "chat_template.jinja", bench.model)
    return bench


class Script:
    """A model that says what stands here, an answer each time it is asked."""

    def __init__(self, bench: Bench, *answers: str) -> None:
        self._answers = iter(answers)
        self.asked: list[list[Json]] = []
        self.samplings: list[SamplingParams] = []

        def stream(
            llm: LLM, messages: list[Json], sampling: SamplingParams, tools: Sequence[Json] | None
        ) -> Iterator[RequestOutput]:
            self.prompt = llm.encode_chat(messages, tools)
            self.asked.append(copy.deepcopy(messages))
            self.samplings.append(sampling)
            return self._pieces(next(self._answers))

        bench.monkeypatch.setattr(LLM, "stream", stream)

    @staticmethod
    def _pieces(answer: str) -> Iterator[RequestOutput]:
        text, stop = "", answer.endswith(CTRL_C)
        for at in range(0, len(answer), 3):
            piece = answer[at : at + 3].removesuffix(CTRL_C)
            text += piece
            yield RequestOutput(0, [1], [2] * at, text, piece, None)
        if stop:
            raise KeyboardInterrupt
        yield RequestOutput(0, [1], [2], text, "", "stop")


def chat(bench: Bench, lines: str, *flags: str, tools: str = TOOLS, yes: bool = True) -> Ran:
    Path("tools.py").write_text(tools, "utf-8")
    said = (*flags, *(["--yes"] if yes else []))
    return bench.glm4("chat", "-m", str(bench.model), "--tools", "tools.py", *said, stdin=f"{lines}/exit\n".encode())


def shown(ran: Ran, arrow: str) -> list[str]:
    return [line.removeprefix(arrow + " ") for line in ran.err.splitlines() if line.startswith(arrow)]


def results(messages: list[Json]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "tool"]


def test_calls_go_on_until_there_is_an_answer(bench: Bench) -> None:
    script = Script(
        bench,
        'Let me look.\nget_weather\n{"city": "北京"}<|assistant|>get_weather\n{"city": "上海", "days": 5}',
        'get_weather\n{"city": "nowhere"}',
        'get_weather\n{"town": "深圳"}',
        'get_weather\n{"city": "深',
        "It is warm.",
    )
    ran = chat(bench, "How warm is it?\n/save chat.json\n")
    assert (ran.code, ran.out) == (0, "Let me look.\nIt is warm.\n11 messages written to chat.json\n")
    calls = [
        '{"city": "北京"}',
        '{"city": "上海", "days": 5}',
        '{"city": "nowhere"}',
        '{"town": "深圳"}',
        '{"city": "深',
    ]
    expected = [
        '{"city": "北京", "degrees": 21}',
        '{"city": "上海", "degrees": 25}',
        '{"error": "LookupError: no such city"}',
        '{"error": "wrong arguments: Object contains unknown field `town`"}',
        '{"error": "the arguments are not valid JSON: Input data was truncated"}',
    ]
    assert shown(ran, "→") == [f"get_weather {arguments}" for arguments in calls]
    assert shown(ran, "←") == expected

    messages = json.loads(Path("chat.json").read_text("utf-8"))
    assert script.asked[-1] == messages[:-1]
    assert results(messages) == expected
    assert [message["role"] for message in messages[:4]] == ["user", "assistant", "tool", "tool"]
    assert messages[1]["content"] == "Let me look."
    asked = [call for message in messages for call in message.get("tool_calls", [])]
    assert [call["function"] for call in asked] == [{"name": "get_weather", "arguments": text} for text in calls]
    ids = [call["id"] for call in asked]
    assert ids == [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    assert len(set(ids)) == 5
    assert all(sampling.skip_special_tokens is False for sampling in script.samplings)


def test_without_tools_control_tokens_are_left_out(bench: Bench) -> None:
    script = Script(bench, "Hello.")
    assert bench.glm4("chat", "-m", str(bench.model), stdin=b"hi\n/tools\n/exit\n").out == (
        "Hello.\n  none: start with --tools FILE.py\n"
    )
    assert script.samplings[0].skip_special_tokens is None


def test_rounds_have_a_limit(bench: Bench) -> None:
    script = Script(bench, *['get_weather\n{"city": "北京"}'] * 3, "Warm.")
    ran = chat(bench, "How warm?\nWell?\n", "--max-rounds", "2")
    assert "(no answer after 2 rounds of calls: say something, or raise --max-rounds)" in ran.err
    assert len(script.asked) == 4
    assert ran.out == "Warm.\n"


def test_long_results_are_cut(bench: Bench) -> None:
    script = Script(
        bench, 'read\n{"path": "a"}', "Read.", 'read\n{"path": "a"}<|assistant|>read\n{"path": "b"}', "Read."
    )
    ran = chat(bench, "Read.\n/clear\nRead both.\n", "--max-model-len", "512")
    assert results(script.asked[1]) == ["x" * 256 + "\n(cut: these are 256 of 5000 characters)"]
    assert results(script.asked[3]) == ["x" * 128 + "\n(cut: these are 128 of 5000 characters)"] * 2
    assert shown(ran, "←")[0] == "x" * 256


def test_ctrl_c_stops_a_call_and_the_model_reads_that(bench: Bench) -> None:
    script = Script(bench, "rest\n{}", "I waited.")
    ran = chat(bench, "Rest.\n")
    assert results(script.asked[1]) == ['{"error": "the user stopped this call before it had a result"}']
    assert ran.out == "I waited.\n"


def test_an_answer_that_is_stopped_calls_nothing(bench: Bench) -> None:
    Script(bench, 'One moment.\nget_weather\n{"city": "北京"}<|assistant|>get_weather\n{"ci' + CTRL_C)
    ran = chat(bench, "How warm?\n/save chat.json\n")
    messages = json.loads(Path("chat.json").read_text("utf-8"))
    assert messages == [{"role": "user", "content": "How warm?"}, {"role": "assistant", "content": "One moment."}]
    assert shown(ran, "→") == []


def test_undo_and_retry_take_the_calls_back_too(bench: Bench) -> None:
    call = 'get_weather\n{"city": "北京"}'
    script = Script(bench, "Hi.", call, "Warm.", call, "Very warm.")
    ran = chat(bench, "Hello\nHow warm?\n/retry\n/undo\n/save chat.json\n")
    assert ran.out.splitlines()[:4] == ["Hi.", "Warm.", "Very warm.", "took back: How warm?"]
    assert script.asked[1] == script.asked[3]
    assert json.loads(Path("chat.json").read_text("utf-8")) == script.asked[0] + [
        {"role": "assistant", "content": "Hi."}
    ]


def test_a_failure_after_a_call_keeps_the_call(bench: Bench) -> None:
    script = Script(bench, 'get_weather\n{"city": "北京"}', "Warm.")
    bench.monkeypatch.setattr(LLM, "encode_chat", _fails_after_tools(LLM.encode_chat))
    ran = chat(bench, "How warm?\n/save chat.json\nGo on.\n")
    assert "error: messages: too much" in ran.err
    assert "(the calls so far and their results stay: say something to go on, or /undo)" in ran.err
    messages = json.loads(Path("chat.json").read_text("utf-8"))
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert results(messages) == ['{"city": "北京", "degrees": 21}']
    assert script.asked[1] == [*messages, {"role": "user", "content": "Go on."}]
    assert ran.out.endswith("Warm.\n")


def test_a_round_that_is_not_whole_leaves_no_trace(bench: Bench) -> None:
    Script(bench, 'get_weather\n{"city": "北京"}<|assistant|>get_weather\n{"city": "上海"}')
    run, calls = Toolbox.run, iter([False, True])

    def stopped_between(toolbox: Toolbox, call: ToolCall, longest: int) -> str:
        if next(calls):
            raise KeyboardInterrupt
        return run(toolbox, call, longest)

    bench.monkeypatch.setattr(Toolbox, "run", stopped_between)
    chat(bench, "How warm?\n/save chat.json\n")
    assert json.loads(Path("chat.json").read_text("utf-8")) == []


def _fails_after_tools(encode: Any) -> Any:
    from glm4.errors import PromptError

    def checked(llm: LLM, messages: list[Json], tools: Any = None) -> Any:
        if messages[-1]["role"] == "tool":
            raise PromptError("messages: too much")
        return encode(llm, messages, tools)

    return checked


def test_thoughts_of_a_z1_are_kept_apart(bench: Bench) -> None:
    shutil.rmtree(bench.model)
    shutil.copytree(REPOSITORY / "demo" / "glm4-z1-demo", bench.model)
    script = Script(
        bench, 'I look it up.\n</think>\n\nget_weather\n{"city": "北京"}', "21.</think>\nWarm.", "No.</think>Hi."
    )
    ran = chat(bench, "How warm?\nHello\n/save chat.json\n")
    assert ran.out.startswith("Warm.\nHi.\n")
    assert "I look it up.\n\n→ get_weather" in ran.err
    messages = json.loads(Path("chat.json").read_text("utf-8"))
    answers = [message for message in messages if message["role"] == "assistant"]
    assert [message["reasoning_content"] for message in answers] == ["I look it up.\n", "21.", "No."]
    assert [message["content"] for message in answers] == ["", "Warm.", "Hi."]
    assert answers[0]["tool_calls"][0]["function"]["arguments"] == '{"city": "北京"}'
    assert all("think>" not in message["content"] for message in script.asked[-1])


def test_rumination_brings_its_own_tools(bench: Bench, shared: Path) -> None:
    template = shared / "glm4-0414" / "GLM-Z1-Rumination-32B-0414" / "chat_template.jinja"
    shutil.copy(template, bench.model / "chat_template.jinja")
    ran = chat(bench, "hi\n")
    assert ran.message == (
        "--tools: this model's chat template has tools of its own and ignores all others; leave them out"
    )
    assert ran.code == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--yes"], "--yes is about tools, and there are none: add --tools FILE.py"),
        (["--max-rounds", "3"], "--max-rounds is about tools, and there are none: add --tools FILE.py"),
        (["--tools", "nowhere.py", "--yes"], "nowhere.py is no file: give a Python file whose functions are the tools"),
        (
            ["--tools", "tools.py"],
            "--tools asks before each call, and standard input is no terminal: add --yes, or type",
        ),
    ],
)
def test_flags_that_do_not_go_together(bench: Bench, flags: list[str], message: str) -> None:
    ran = bench.glm4("chat", "-m", str(bench.model), *flags)
    assert (ran.code, ran.message) == (2, message)


def test_what_is_asked_about_is_what_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = '{"city": "\x1b[2K\x9b\u202e\u200bB"}'
    assert printable(arguments) == '{"city": "\\x1b[2K\\x9b\\u202e\\u200bB"}'
    assert printable("北京 naïve 😀\n") == "北京 naïve 😀\n"
    tools = [FunctionTool.of(_echo)]
    Toolbox(tools, ask=False).run(ToolCall("_echo", arguments), 100)
    assert "\x1b[2K" not in capsys.readouterr().err


def _echo(city: str) -> str:
    """Give it back."""
    return city


def test_load_goes_on_with_what_was_saved(bench: Bench) -> None:
    call = 'get_weather\n{"city": "北京"}'
    script = Script(bench, call, "Warm.", "Yes.", "No.")
    chat(bench, "How warm?\n/save chat.json\nSure?\n", "-s", "Be brief.")
    ran = chat(bench, "/load chat.json\nSure?\n/clear\n/save cleared.json\n")
    assert ran.out.splitlines()[0] == "5 messages read from chat.json"
    assert script.asked[3] == script.asked[2]
    assert "forgot the conversation, but not the system prompt" in ran.out
    assert json.loads(Path("cleared.json").read_text("utf-8")) == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "saved.json: No such file or directory; name a file that /save wrote"),
        ("[", "saved.json is not JSON (Expecting value: line 1 column 2 (char 1)); name a file that /save wrote"),
        ("{}", "messages: expected a list of messages, got a dict"),
        ("[]", "messages: the list is empty; give at least one message"),
        ('[{"role": "usr", "content": "x"}]', "messages[0]: unknown role 'usr'; did you mean 'user'?"),
    ],
)
def test_load_of_something_else_changes_nothing(bench: Bench, content: str | None, message: str) -> None:
    if content is not None:
        Path("saved.json").write_text(content, "utf-8")
    stdin = b"/system Be brief.\n/load saved.json\n/save chat.json\n"
    ran = bench.glm4("chat", "-m", str(bench.model), stdin=stdin)
    assert message in ran.err
    assert json.loads(Path("chat.json").read_text("utf-8")) == [{"role": "system", "content": "Be brief."}]


def test_commands_say_what_they_did(bench: Bench) -> None:
    Script(bench, "Hi.")
    long = "word " * 30
    lines = ["/undo", "/system Be brief.", "/clear", "/system", "/clear", long, "/undo", "/save", "/load"]
    ran = bench.glm4("chat", "-m", str(bench.model), stdin="\n".join(lines).encode())
    assert ran.out.splitlines() == [
        "nothing has been said yet",
        "a new conversation, with this system prompt",
        "forgot the conversation, but not the system prompt",
        "a new conversation, without a system prompt",
        "forgot the conversation",
        "Hi.",
        "took back: " + long[:59] + "…",
        "say where: /save FILE",
        "say which: /load FILE",
        "",
    ]


@pytest.fixture
def terminal(bench: Bench) -> Iterator[Terminal]:
    terminal = Terminal("chat", "-m", str(DEMO), "--tools", str(EXAMPLE), "--max-rounds", "1")
    yield terminal
    terminal.close()


QUESTION = "call it? [y]es, [n]o, [a]lways calculator: "


def test_the_question_before_each_call(terminal: Terminal) -> None:
    def ask() -> str:
        terminal.say("/clear")
        terminal.type("63减26等于多少\n")
        return terminal.wait_for(QUESTION)

    terminal.wait_for(">>> ")
    assert "calculator: 计算一个算式" in terminal.say("/tools")
    for refusal in ("n\n", CTRL_C, CTRL_D):
        assert '→ calculator {"expression": "63 - 26"}' in ask()
        terminal.type(refusal)
        assert "←" not in terminal.wait_for(">>> ")
        terminal.say("/save chat.json")
        assert results(json.loads(Path("chat.json").read_text("utf-8"))) == ['{"error": "the user refused this call"}']

    terminal.say("/clear")
    terminal.type("63减26等于多少\ny\n")  # a reply before there is a question
    terminal.wait_for(QUESTION)
    terminal.type("what?\n")
    terminal.wait_for(QUESTION)  # again
    assert "←" not in terminal.text
    terminal.type("y\n")
    assert '← {"result": 37}' in terminal.wait_for(">>> ")
    ask()
    terminal.type("always\n")
    assert '← {"result": 37}' in terminal.wait_for(">>> ")
    terminal.say("/clear")
    assert QUESTION not in terminal.say("63减26等于多少")
    terminal.type(CTRL_D)
    assert terminal.process.wait(timeout=60) == 0
