"""`predict_data`: which values are files, which are prompts, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4.errors import PromptError
from glm4.mindformers.prompts import read_prompts


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*values: str) -> str:
    with pytest.raises(PromptError) as caught:
        read_prompts(values)
    return str(caught.value)


@pytest.mark.parametrize(
    "prompt",
    [
        "请介绍一下北京",
        "1/2 等于几",
        "1/2等于几",
        "and/or",
        "TCP/IP",
        "km/h",
        "他/她是谁？",
        "// 是什么",
        "//这行注释是什么意思",
        "/help me",
        "What is in README.md?",
        "如何写 requirements.txt",
        "Explain ./configure && make",
        "e.g.",
        "node.js",
        "3.14",
        "a = b/c",
        " ./not-a-path.txt",
        "...",
        "~",
        "a" * 5000,
        "长" * 1_000_000,
        "~nobody-here",
        "nul\0byte",
    ],
)
def test_prompts_are_prompts(prompt: str) -> None:
    assert read_prompts([prompt]) == (prompt,)


@pytest.mark.parametrize(
    "path",
    [
        "./prompts",
        "../prompts.txt",
        "/data/prompts",
        "/data/my prompts.txt",
        "~/prompts.txt",
        "prompts.txt",
        "data/prompts.jsonl",
        "PROMPTS.TXT",
        "问题.md",
        "questions.csv",
        "here/prompts",
    ],
)
def test_paths_to_nothing_are_errors(path: str) -> None:
    Path("here").mkdir()
    assert refusal(path).startswith(f"predict_data {path}: no such file")


@settings(deadline=None)
@given(st.text(min_size=1).filter(str.strip))
def test_a_prompt_after_a_space_is_never_taken_for_a_path(text: str) -> None:
    text = " " + text
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        return
    assert read_prompts([text]) == (text.replace(r"\n", "\n"),)


def test_a_folder_is_an_error_when_written_as_a_path() -> None:
    Path("docs").mkdir()
    assert refusal("./docs").startswith("predict_data ./docs is a folder")
    assert read_prompts(["docs"]) == ("docs",)


def test_one_value_may_be_a_file_and_several_are_prompts() -> None:
    Path("a.txt").write_text("from the file")
    assert read_prompts(["one", "two"]) == ("one", "two")
    assert read_prompts(["a.txt"]) == ("from the file",)


def test_backslash_n_is_a_newline() -> None:
    Path("a.txt").write_text(r"one\ntwo")
    assert read_prompts([r"one\ntwo"]) == read_prompts(["a.txt"]) == ("one\ntwo",)


@pytest.mark.parametrize(
    "data",
    [
        "一\n二=2\n",
        "一\n二=2",
        "一\n二=2\n\n\n",
        "一\r\n二=2\r\n",
        "\ufeff一\n二=2\n",
    ],
)
def test_file_of_one_prompt_a_line(data: str) -> None:
    Path("p.txt").write_bytes(data.encode())
    assert read_prompts(["p.txt"]) == ("一", "二=2")


def test_only_line_feeds_end_a_line() -> None:
    """str.splitlines would also cut at U+2028, form feeds and the like."""
    Path("p.txt").write_bytes("a\u2028b\x0cc\x85d\n".encode())
    assert read_prompts(["p.txt"]) == ("a\u2028b\x0cc\x85d",)


@settings(deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\r\n\\", codec="utf-8"), min_size=1).filter(str.strip), min_size=1
    )
)
def test_any_lines_come_back(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert read_prompts([str(path)]) == tuple(lines)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "predict_data p.txt is empty"),
        (b"\n\r\n", "predict_data p.txt is empty"),
        (b"\xef\xbb\xbf", "predict_data p.txt is empty"),
        (b"one\n\ntwo\n", "predict_data p.txt:2: a blank line"),
        (b"one\n \t\ntwo\n", "predict_data p.txt:2: a blank line"),
        (b"one\ntwo\n   \n", "predict_data p.txt:3: a blank line"),
        (b"\none\n", "predict_data p.txt:1: a blank line"),
        (b"one\ntw\xff\n", "predict_data p.txt:2: not UTF-8 text"),
        ("一\n".encode("utf-16"), "predict_data p.txt:1: not UTF-8 text"),
        (rb"one" + b"\n" + rb"\n", "predict_data p.txt:2: the prompt is empty"),
    ],
)
def test_a_bad_file_is_an_error_with_its_line(data: bytes, expected: str) -> None:
    Path("p.txt").write_bytes(data)
    assert refusal("p.txt").startswith(expected)


@pytest.mark.parametrize("prompt", ["", "  ", r"\n", "\t\n"])
def test_an_empty_prompt(prompt: str) -> None:
    assert refusal(prompt).startswith("predict_data: the prompt is empty")
    assert refusal("one", prompt).startswith("predict_data[1]: the prompt is empty")


def test_a_prompt_that_the_shell_passed_in_another_encoding() -> None:
    message = refusal(b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert message == "predict_data: the prompt is not UTF-8 text; convert it first"


def test_files_do_not_hide_among_prompts(folder: Path) -> None:
    (folder / "one.txt").write_text("hi")
    assert refusal("one.txt", "two") == (
        "predict_data one.txt is a file, and so only it can be given: put the prompts into one file"
    )
    assert refusal("hi", "nofile.txt").startswith("predict_data nofile.txt: no such file")
