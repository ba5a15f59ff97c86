"""`glm4 generate` says what transformers says, of the prompt that was meant."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from programs import Bench, finish, start
from tiny import Reference

from glm4.api.answer import Answer, AnswerForm
from glm4.cli.generate import show
from glm4.engine.request import RequestOutput

START, END = "[gMASK]<sop>", "<|assistant|>"


@pytest.mark.parametrize(
    ("argv", "stdin", "rendered"),
    [
        (["generate", "hi"], b"", f"{START}<|user|>\nhi{END}"),
        (["generate", "two", "words"], b"", f"{START}<|user|>\ntwo words{END}"),
        (["generate"], "你好\n".encode(), f"{START}<|user|>\n你好{END}"),
        (["generate", "Why?"], b"a log\nof two lines\n", f"{START}<|user|>\na log\nof two lines\nWhy?{END}"),
        (["generate"], b"a\r\nb\n", f"{START}<|user|>\na\r\nb{END}"),
        (["generate", "hi", "-s", "Be brief."], b"", f"{START}<|system|>\nBe brief.<|user|>\nhi{END}"),
        (["generate", "--raw", "Once upon"], b"", "Once upon"),
        (["hi"], b"", f"{START}<|user|>\nhi{END}"),
        (["generate", "--", "--raw"], b"", f"{START}<|user|>\n--raw{END}"),
    ],
)
def test_answer(bench: Bench, reference: Reference, argv: list[str], stdin: bytes, rendered: str) -> None:
    flags = ["-m", "model", "-o", "max_new_tokens", "12"]
    ran = bench.glm4(argv[0], *flags, *argv[1:], stdin=stdin)
    assert (ran.code, ran.out) == (0, reference.answer(rendered, 12) + "\n")
    assert ran.err == "(stopped after 12 tokens, the limit)\n"


def test_the_model_from_the_environment(bench: Bench, reference: Reference) -> None:
    bench.monkeypatch.setenv("GLM4_MODEL", "model")
    ran = bench.glm4("generate", "hi", "-o", "max_new_tokens", "3")
    assert ran.out == reference.answer(f"{START}<|user|>\nhi{END}", 3) + "\n"


def test_stats(bench: Bench, reference: Reference) -> None:
    ran = bench.generate("--stats", "-o", "max_new_tokens", "5")
    counts = re.findall(r"(prefill|decode): (\d+) tokens in [\d.]+ s, [\d.]+ tokens/s", ran.err)
    assert counts == [("prefill", str(reference.count(f"{START}<|user|>\nhi{END}"))), ("decode", "4")]
    assert "tokens/s" not in ran.out


def test_stop_string(bench: Bench, reference: Reference) -> None:
    whole = reference.answer(f"{START}<|user|>\nhi{END}", 12)
    stop = whole[6]
    ran = bench.generate("-o", "max_new_tokens", "12", "-o", "stop", "never said", "-o", "stop", stop)
    assert ran.out == whole[: whole.index(stop)] + "\n"
    assert ran.err == ""


def test_seed(bench: Bench) -> None:
    said = [
        bench.generate("-o", "max_new_tokens", "20", "-o", "temperature", "3", "--seed", seed).out for seed in "778"
    ]
    assert said[0] == said[1] != said[2]


def test_it_streams(bench: Bench) -> None:
    bench.edit_config(max_position_embeddings=100_000)
    process = start("hi", "-m", "model", "-o", "ignore_eos", "true", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)
    assert process.poll() is None  # minutes before it ends
    process.send_signal(signal.SIGINT)
    finish(process)


def test_a_reader_that_goes_away_ends_it_quietly(bench: Bench) -> None:
    process = start("hi", "-m", "model", "-o", "ignore_eos", "true", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.parametrize("hidden", [False, True])
def test_thoughts_go_to_standard_error(capfd: pytest.CaptureFixture[str], hidden: bool) -> None:
    seen: list[tuple[str, str]] = []

    def outputs() -> Iterator[RequestOutput]:
        text = ""
        for delta in ("Hm", "m.</th", "ink>\n\nYe", "s."):
            text += delta
            yield RequestOutput(0, [1], [2], text, delta, None)
            seen.append(capfd.readouterr())

    answer = Answer()
    last = show(outputs(), AnswerForm(inside_thought=True), answer, hide_thoughts=hidden)
    assert last.text == "Hmm.</think>\n\nYes."
    assert (answer.thought, answer.text) == ("Hmm.", "Yes.")
    assert capfd.readouterr().out == "\n"
    answers, thoughts = ([piece[stream] for piece in seen] for stream in (0, 1))
    assert answers == ["", "", "Ye", "s."]
    assert thoughts == (["", "", "", ""] if hidden else ["Hm", "m.", "", ""])


def test_a_terminal_without_chinese_shows_escapes(bench: Bench, reference: Reference) -> None:
    bench.monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    flags = ("-o", "max_new_tokens", "12")
    ran = finish(start("hi", "-m", "model", *flags, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE))
    answer = reference.answer(f"{START}<|user|>\nhi{END}", 12)
    assert not answer.isascii()
    assert ran.out == answer.encode("ascii", "backslashreplace").decode() + "\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(bench: Bench, reference: Reference, closed: str) -> None:
    command = f'exec "$0" -m glm4 hi -m model -o max_new_tokens 3 {closed}'
    done = subprocess.run(["/bin/sh", "-c", command, sys.executable], capture_output=True, text=True)
    assert done.returncode == 0
    answer = reference.answer(f"{START}<|user|>\nhi{END}", 3)
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else answer + "\n")
