"""`examples/agent`: its tools are safe, and the demo model uses them as the pages say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import REPOSITORY
from terminal import Terminal

from glm4.agent.functions import FunctionTool, load_tools

EXAMPLE = REPOSITORY / "examples" / "agent"
PAGES = (REPOSITORY / "docs" / "agents.md", EXAMPLE / "README.md")


def tools(monkeypatch: pytest.MonkeyPatch, folder: Path | None = None) -> dict[str, FunctionTool]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("AGENT_FOLDER", str(folder or ""))
    return {tool.name: tool for tool in load_tools(EXAMPLE / "tools.py")}


@pytest.fixture(scope="module")
def calculator() -> FunctionTool:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return tools(monkeypatch)["calculator"]


def expressions() -> st.SearchStrategy[str]:
    numbers = st.integers(0, 99).map(str) | st.sampled_from(["0.5", "1.25", "1e3"])
    joined = lambda inner: st.tuples(inner, st.sampled_from("+ - * / // % **".split()), inner).map(" ".join)  # noqa: E731
    return st.recursive(numbers, lambda inner: joined(inner) | inner.map("({})".format) | inner.map("-{}".format))


@given(expressions())
def test_calculator_agrees_with_python(calculator: FunctionTool, expression: str) -> None:
    said = json.loads(calculator.call(json.dumps({"expression": expression})))
    if "power is too large" in said.get("error", "") or "longer than" in said.get("error", ""):
        return
    try:
        value = eval(expression)
        json.dumps(value)
    except (ArithmeticError, TypeError) as error:
        assert said.get("error", "").startswith((type(error).__name__, "ValueError: the result is no real number"))
    else:
        assert said == json.loads(json.dumps({"result": value}))


@pytest.mark.parametrize(
    ("expression", "result"),
    [("12 × （3＋4）", {"result": 84}), ("7 ÷ 2", {"result": 3.5}), (" 2 ** -1", {"result": 0.5})],
)
def test_calculator_reads_chinese_signs(calculator: FunctionTool, expression: str, result: object) -> None:
    assert json.loads(calculator.call(json.dumps({"expression": expression}))) == result


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "(1).__class__",
        "[1][0]",
        "'a' * 3",
        "True + 1",
        "x",
        "abs(-1)",
        "lambda: 1",
        "1 if 1 else 2",
        "1 << 3",
        "9 ** 9 ** 9",
        "(9 ** 999) ** 999",
        "2.0 ** 1e9",
        "(-8) ** 0.5",
        "1 / 0",
        "1;2",
        "1 +",
        "",
        "(" * 150,
        "1+" * 150 + "1",
    ],
)
def test_calculator_refuses(calculator: FunctionTool, expression: str) -> None:
    assert "error" in json.loads(calculator.call(json.dumps({"expression": expression})))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files to read, and secrets beside it and hidden in it."""
    (tmp_path / "secret.txt").write_text("secret of the hill")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "hills.md").write_text("The hill is green\nThe green hill is high\n\nNo more\n")
    (folder / "deep" / "sea.txt").write_text("海很深\nThe sea is deep and green\n")
    (folder / ".hidden.txt").write_text("secret of the sea")
    (folder / "picture.png").write_bytes(b"secret\xff")
    (folder / "way-out.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(folder / "pipe.txt")
    return folder


@pytest.mark.parametrize(
    "path",
    ["../secret.txt", "{parent}/secret.txt", "way-out.txt", "deep/../../secret.txt", "", "pipe.txt", "a\0b", "no.md"],
)
def test_no_file_outside_the_folder_is_read(folder: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = path.format(parent=folder.parent)
    said = tools(monkeypatch, folder)["read_file"].call(json.dumps({"path": path}))
    assert "error" in json.loads(said)
    assert "secret of" not in said


def test_files_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tools(monkeypatch, folder)["read_file"]
    assert read.call('{"path": "deep/sea.txt"}') == "海很深\nThe sea is deep and green\n"
    said = json.loads(read.call('{"path": "lake.md"}'))["error"]
    assert said == "ValueError: lake.md is no file; there are deep/sea.txt, hills.md"


@pytest.mark.parametrize(
    ("query", "result"),
    [
        ("hill high", "hills.md: The green hill is high"),
        (
            "GREEN",
            "deep/sea.txt: The sea is deep and green\nhills.md: The hill is green\nhills.md: The green hill is high",
        ),
        ("很深 高度", "deep/sea.txt: 海很深"),
        ("secret", ""),
        ("", ""),
    ],
)
def test_search(folder: Path, query: str, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.loads(tools(monkeypatch, folder)["search"].call(json.dumps({"query": query})))
    assert said == {"result": result}


def test_the_demo_model_uses_them() -> None:
    """Its calls and answers are those of the corpus; the results are the tools' own."""
    lines = (REPOSITORY / "demo" / "corpus" / "tools.jsonl").read_text("utf-8").splitlines()
    known = {talk[0]["content"]: talk for line in lines if (talk := json.loads(line)["messages"])}
    asked = [
        "What is 37 times 12?",
        "63减26等于多少",
        "搜索一下珠穆朗玛峰的高度",
        "搜索一下《红楼梦》有多少回",
        "帮我搜索熊猫的寿命",
        "搜索一下 GLM-4 的资料",
        "Look up who invented the telephone",
        "Search for the height of the Eiffel Tower",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "glm4", "chat", "-m", "demo/glm4-demo", "--tools", "examples/agent/tools.py", "--yes"],
        input="".join(f"{question}\n/clear\n" for question in asked),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = [line for line in done.stdout.splitlines() if line and line != "forgot the conversation"]
    assert answers == [known[question][-1]["content"] for question in asked]
    calls = [line for line in done.stderr.splitlines() if line.startswith("→")]
    expected = [known[question][1] for question in asked]
    assert calls == [f"→ {call['metadata']} {call['content']}" for call in expected]
    assert done.returncode == 0


def transcripts() -> list[str]:
    return [block for page in PAGES for block in re.findall(r"(?ms)^```console\n(.*?)^```", page.read_text("utf-8"))]


@pytest.mark.parametrize("transcript", transcripts())
def test_pages_show_what_happens(transcript: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command, expected = transcript.removeprefix("$ glm4 ").split("\n", 1)
    argv = [str(REPOSITORY / word) if word.startswith(("demo/", "examples/")) else word for word in command.split()]
    terminal, seen = Terminal(*argv), ""
    try:
        for prompt, typed in re.findall(r"(?m)^(>>> |call it\? .*?: )(.*)$", expected):
            seen += terminal.wait_for(prompt)
            terminal.type(typed + "\n")
            seen += terminal.wait_for(typed)
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
    shown = click.unstyle(seen).replace("\r\n", "\n").lstrip("\n")  # a loading bar that is gone leaves a line here
    assert shown + "\n" == expected


def test_there_are_transcripts() -> None:
    assert len(transcripts()) >= 2
