"""The whole program, with a model whose answers are known."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from glm4.errors import CheckpointError, EngineError, Glm4Error, PromptError
from glm4.mindformers.run import main
from glm4.options import EngineOptions, SamplingParams

pytestmark = pytest.mark.usefixtures("folder")

REPOSITORY = Path(__file__).resolve().parents[2]
RESULT = Path("text_generation_result.txt")


@dataclass
class EchoLLM:
    """Answers a prompt with itself and says whether it came through the chat template."""

    options: EngineOptions
    has_chat_template: bool = True
    thinks: bool = False
    finish_reason: str = "stop"
    calls: list[tuple[str, int, SamplingParams]] = field(default_factory=list)
    closed: int = 0
    last_stats = SimpleNamespace(prefill_tokens=10, prefill_seconds=0.5, decode_tokens=6, decode_seconds=0.25)

    def chat(self, conversations: list[list[dict[str, str]]], sampling: SamplingParams) -> list[Any]:
        for [message] in conversations:
            assert message["role"] == "user"
        return self._answer("chat", [message["content"] for [message] in conversations], sampling)

    def generate(self, prompts: list[str], sampling: SamplingParams) -> list[Any]:
        return self._answer("raw", prompts, sampling)

    def close(self) -> None:
        self.closed += 1

    def _answer(self, way: str, prompts: list[str], sampling: SamplingParams) -> list[Any]:
        self.calls.append((way, len(prompts), sampling))
        return [
            SimpleNamespace(
                text=f"{way}: {prompt}",
                token_ids=[1, 2, 3],
                finish_reason=self.finish_reason,
                error="a row was lost" if prompt == "lost" else None,
            )
            for prompt in prompts
        ]


def predict(*flags: str, load: Callable[[EngineOptions], Any] = EchoLLM) -> int:
    known = ("--config", "configs/glm4/predict_glm4.yaml", "--pretrained_model_dir", "model")
    return main([*known, *flags], REPOSITORY, load)


def test_answer_is_printed_and_written(capfd: pytest.CaptureFixture[str], folder: Path) -> None:
    flags = ("--run_mode", "predict", "--use_parallel", "False", "--predict_data", "请介绍一下北京")
    assert predict(*flags) == 0
    out, err = capfd.readouterr()
    assert out == "'text_generation_text': [chat: 请介绍一下北京]\n"
    assert ast.literal_eval(RESULT.read_text("utf-8")) == [{"text_generation_text": ["chat: 请介绍一下北京"]}]
    assert f"result: {folder / RESULT}\n" in err
    assert "-m glm4 chat -m model" in err
    assert sorted(path.name for path in folder.iterdir()) == ["model", "output", RESULT.name]


def test_an_answer_that_failed_is_an_error_and_earlier_batches_stay(capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--predict_batch_size", "2")
    assert predict("--predict_data", "a", "b", "c", "lost", *flags) == EngineError("").exit_code
    assert capfd.readouterr().err.splitlines()[-1] == "error: prompt 4: a row was lost"
    assert len(ast.literal_eval(RESULT.read_text("utf-8"))) == 1


def test_batches(capfd: pytest.CaptureFixture[str]) -> None:
    Path("p.txt").write_text("a\nb\nc\nd\n")
    loaded: list[EchoLLM] = []

    def load(options: EngineOptions) -> EchoLLM:
        loaded.append(EchoLLM(options))
        return loaded[-1]

    assert predict("--predict_data", "p.txt", "--predict_batch_size", "2", "--do_sample", "False", load=load) == 0
    assert capfd.readouterr().out == (
        "'text_generation_text': [chat: a, chat: b]\n'text_generation_text': [chat: c, chat: d]\n"
    )
    assert [batch["text_generation_text"] for batch in ast.literal_eval(RESULT.read_text("utf-8"))] == [
        ["chat: a", "chat: b"],
        ["chat: c", "chat: d"],
    ]
    [llm] = loaded
    assert llm.closed == 1
    assert llm.calls == [("chat", 2, SamplingParams(do_sample=False))] * 2
    assert (llm.options.model, llm.options.seed, llm.options.max_device_memory) == ("model", 0, 59 * 2**30)


def test_log(capfd: pytest.CaptureFixture[str]) -> None:
    assert predict("--predict_data", "a", "b", "--output_dir", "logs") == 0
    logged = Path("logs/log/rank_0/info.log").read_text("utf-8")
    err = capfd.readouterr().err
    assert logged in err
    for line in (
        " - glm4 - INFO - ignored: context.mode — ",
        " - glm4 - INFO - loading model\n",
        " - glm4 - INFO - prefill: 20 tokens in 1.00 s, 20.0 tokens/s\n",
        " - glm4 - INFO - decode: 12 tokens in 0.50 s, 24.0 tokens/s\n",
    ):
        assert line in logged


def test_raw_text_where_asked_or_where_there_is_no_template(capfd: pytest.CaptureFixture[str]) -> None:
    def base(options: EngineOptions) -> EchoLLM:
        return EchoLLM(options, has_chat_template=False)

    assert predict("--predict_data", "a", "--use_chat_template", "False") == 0
    assert predict("--predict_data", "a", load=base) == 0
    out, err = capfd.readouterr()
    assert out == "'text_generation_text': [raw: a]\n" * 2
    assert "-m glm4 generate '从前，' -m model" in err
    assert err.count("without a chat template") == 2
    assert predict("--predict_data", "a", "--use_chat_template", "True", load=base) == 2
    assert "error: use_chat_template True: model has no chat template" in capfd.readouterr().err


def test_a_cut_answer_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert predict("--predict_data", "a", "b", load=lambda o: EchoLLM(o, finish_reason="length")) == 0
    assert "WARNING - answer 2 is cut off after 3 tokens" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--predict_data", "./missing.txt"), 4, "error: predict_data ./missing.txt: no such file"),
        (("--predict_data", ""), 4, "error: predict_data: the prompt is empty"),
        (("--predict_data", "a", "--run_mode", "train"), 2, "error: --run_mode: 'train' is not part"),
        (("--predict_data", "a", "--sed", "1"), 2, "error: unknown flag --sed; did you mean --seed?"),
        (
            ("--predict_data", "a", "--pretrained_model_dir", "no"),
            3,
            "error: --pretrained_model_dir: no does not exist",
        ),
        (("--predict_data", "a", "--output_dir", "/proc/none"), 7, "error: output_dir: /proc/none/log"),
        (("--predict_data", "./a\nb.txt"), 4, "error: predict_data ./a b.txt: no such file"),
    ],
)
def test_errors_are_one_line_before_anything_loads(
    capfd: pytest.CaptureFixture[str], flags: tuple[str, ...], code: int, message: str
) -> None:
    def load(_: EngineOptions) -> Any:
        raise AssertionError("nothing may load")

    assert predict(*flags, load=load) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [CheckpointError("model/config.json: not there"), EngineError("request 0: failed")])
def test_an_error_of_the_model_keeps_the_old_result(capfd: pytest.CaptureFixture[str], error: Glm4Error) -> None:
    def load(_: EngineOptions) -> Any:
        raise error

    RESULT.write_text("old")
    assert predict("--predict_data", "a", load=load) == error.exit_code
    err = capfd.readouterr().err
    assert err.endswith(f"\nerror: {error}\n")
    assert "Traceback" not in err
    assert RESULT.read_text() == "old"
    assert predict("--predict_data", "a", "--debug", load=load) == error.exit_code
    assert "Traceback" in capfd.readouterr().err


def test_a_prompt_that_cannot_be_answered_is_numbered(capfd: pytest.CaptureFixture[str]) -> None:
    class PickyLLM(EchoLLM):
        def chat(self, conversations: list[list[dict[str, str]]], sampling: SamplingParams) -> list[Any]:
            if any(message["content"] == "bad" for [message] in conversations):
                raise PromptError("too long")
            return super().chat(conversations, sampling)

    for prompts, flags, which in (
        (["bad"], (), ""),
        (["a", "bad"], (), "prompt 2: "),
        (["a", "b", "c", "bad"], ("--predict_batch_size", "2"), "one of prompts 3 to 4: "),
    ):
        assert predict("--predict_data", *prompts, *flags, load=PickyLLM) == 4
        assert capfd.readouterr().err.endswith(f"\nerror: {which}too long\n")


def test_a_bug_keeps_its_traceback() -> None:
    def load(_: EngineOptions) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        predict("--predict_data", "a", load=load)


def test_ctrl_c(capfd: pytest.CaptureFixture[str]) -> None:
    def load(_: EngineOptions) -> Any:
        raise KeyboardInterrupt

    RESULT.write_text("old")
    assert predict("--predict_data", "a", load=load) == 130
    assert capfd.readouterr().err.endswith("\nerror: interrupted\n")
    assert RESULT.read_text() == "old"


def test_a_full_disk_keeps_the_old_result(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    RESULT.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    assert predict("--predict_data", "a") == 7
    assert "No space left on device" in capfd.readouterr().err
    assert RESULT.read_text() == "old"


def test_a_result_that_could_not_be_written_is_known_before_the_model_loads(capfd: pytest.CaptureFixture[str]) -> None:
    RESULT.mkdir()
    assert predict("--predict_data", "a", load=lambda _: pytest.fail("loaded")) == 7
    assert "is a folder" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_is_full(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails, as it should
    monkeypatch.setattr(sys, "stdout", full)
    assert predict("--predict_data", "a") == 7
    monkeypatch.undo()
    with pytest.raises(OSError):
        full.close()
    assert "error: standard output cannot be written: No space left on device" in capfd.readouterr().err


class TestScript:
    def run(
        self, *argv: str, python: Sequence[str] = (), environment: Mapping[str, str] = os.environ
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *python, str(REPOSITORY / "run_mindformer.py"), *argv]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    def test_help(self) -> None:
        for flag in ("--help", "-h"):
            done = self.run(flag)
            assert done.returncode == 0
            assert "--parallel_config.model_parallel" in done.stdout

    def test_a_terminal_without_chinese_shows_escapes(self) -> None:
        done = self.run("--help", environment={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0
        assert "\\u8bf7" in done.stdout

    def test_a_current_folder_that_is_gone(self, folder: Path) -> None:
        (folder / "gone").mkdir()
        os.chdir("gone")
        (folder / "gone").rmdir()
        done = self.run("--config", "configs/glm4/predict_glm4.yaml")
        assert (done.returncode, done.stderr) == (
            7,
            "error: the current folder is not there any more: change into another one\n",
        )

    def test_works_from_any_folder_and_finds_the_repositorys_yaml(self) -> None:
        done = self.run("--config", "configs/glm4/predict_glm4.yaml", "--predict_data", "a")
        assert done.returncode == 3
        assert done.stderr.startswith("error: ")
        assert "/path/hf_dir does not exist" in done.stderr
        assert str(REPOSITORY / "configs/glm4/predict_glm4.yaml") in done.stderr

    def test_finds_the_package_beside_it_when_it_is_not_installed(self, folder: Path) -> None:
        (folder / "yaml").symlink_to(Path(yaml.__file__).parent)  # all that it needs before a model loads
        done = self.run(python=("-S",), environment={"PYTHONPATH": str(folder)})  # -S: without site-packages
        assert done.stderr == "error: --config is missing: pass --config configs/glm4/predict_glm4.yaml\n"
