"""`glm4 chat` on a real (pseudo-)terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import Bench
from terminal import CTRL_C, CTRL_D, Terminal
from tiny import Reference

START, END = "[gMASK]<sop>", "<|assistant|>"


@pytest.fixture
def terminal(bench: Bench) -> Iterator[Terminal]:
    bench.edit_config(max_position_embeddings=100_000)
    terminal = Terminal("chat", "-m", "model", "-s", "Be brief.", "-o", "max_new_tokens", "8")
    yield terminal
    terminal.close()


def saved(terminal: Terminal) -> list[dict[str, str]]:
    """The conversation so far."""
    assert "written to chat.json" in terminal.say("/save chat.json")
    messages: list[dict[str, str]] = json.loads(Path("chat.json").read_text("utf-8"))
    return messages


def rendered(messages: list[dict[str, str]]) -> str:
    turns = "".join(f"<|{message['role']}|>\n{message['content']}" for message in messages)
    return START + turns + END


def test_conversation(terminal: Terminal, reference: Reference) -> None:
    assert "/help lists the commands" in terminal.wait_for(">>> ")
    assert "nothing has been said yet" in terminal.say("/undo")
    terminal.say("hello")
    terminal.say("again?")
    whole = saved(terminal)
    assert [message["role"] for message in whole] == ["system", "user", "assistant", "user", "assistant"]
    assert [whole[i]["content"] for i in (0, 1, 3)] == ["Be brief.", "hello", "again?"]
    for answer in (2, 4):
        assert whole[answer]["content"] == reference.answer(rendered(whole[:answer]), 8)

    terminal.say("/undo")
    assert saved(terminal) == whole[:3]
    terminal.say("/retry")
    assert saved(terminal) == whole[:3]  # greedy, so the same words
    assert "tokens/s" in terminal.say("/stats")
    for command in ("/clear", "/retry", "/exit"):
        assert command in terminal.say("/help")
    assert "did you mean '/retry'?" in terminal.say("/retyr")
    terminal.say("/clear")
    assert saved(terminal) == whole[:1]
    terminal.say("/system Be kind.")
    assert saved(terminal) == [{"role": "system", "content": "Be kind."}]

    terminal.type("two \\\n")
    terminal.wait_for("... ")
    terminal.say("lines")
    assert saved(terminal)[1]["content"] == "two \nlines"

    terminal.type(CTRL_D)
    assert terminal.process.wait(timeout=60) == 0
    history = Path("state/glm4/history").read_text("utf-8")
    assert "hello\n" in history


def test_ctrl_c_stops_the_answer_and_not_the_program(bench: Bench) -> None:
    bench.edit_config(max_position_embeddings=100_000)
    terminal = Terminal("chat", "-m", "model", "-o", "ignore_eos", "true")
    try:
        terminal.wait_for(">>> ")
        terminal.type("hello\n")
        terminal.wait_for("hello\r\n")
        while not terminal.text.strip():  # the first words of an answer that would take minutes
            terminal.read()
        terminal.type(CTRL_C)
        terminal.wait_for("(stopped)")
        terminal.wait_for(">>> ")
        messages = saved(terminal)
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert messages[1]["content"]
        terminal.press_until(CTRL_C, "(Ctrl-D leaves)")
        terminal.wait_for(">>> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()


def test_ctrl_c_before_the_answer_begins_takes_the_question_back(bench: Bench) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    bench.monkeypatch.setattr("glm4.engine.llm.LLM.encode_chat", interrupted)
    ran = bench.glm4("chat", "-m", "model", stdin=b"one\n/save chat.json\n")
    assert (ran.code, json.loads(Path("chat.json").read_text("utf-8"))) == (0, [])
    assert "(stopped)" in ran.out


def test_piped_turns(bench: Bench, reference: Reference) -> None:
    ran = bench.glm4("chat", "-m", "model", "-o", "max_new_tokens", "4", stdin=b"one\n\ntwo\n/exit\nthree\n")
    first = reference.answer(rendered([{"role": "user", "content": "one"}]), 4)
    turns = [("user", "one"), ("assistant", first), ("user", "two")]
    second = reference.answer(rendered([{"role": role, "content": text} for role, text in turns]), 4)
    assert (ran.code, ran.out) == (0, f"{first}\n{second}\n")


def test_an_error_does_not_end_it_and_leaves_no_trace(bench: Bench) -> None:
    stdin = b"x" * 600 + b"\none\n/save chat.json\n"
    ran = bench.glm4("chat", "-m", "model", "-o", "max_new_tokens", "4", stdin=stdin)
    assert ran.code == 0
    assert "error: the prompt has 605 tokens" in ran.err
    assert json.loads(Path("chat.json").read_text("utf-8"))[0]["content"] == "one"
