"""The demo model behaves as its card says: it answers its corpus word for word and stops by itself."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glm4 import LLM, SamplingParams
from glm4.text.reasoning import split_thought

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "demo"
sys.path.insert(0, str(REPOSITORY / "tools"))
from demo_corpus import SECTIONS, Task, load_tasks  # noqa: E402  # the corpus as the training saw it

VERBATIM = SamplingParams(do_sample=False, skip_special_tokens=False, max_new_tokens=300)


@pytest.fixture(scope="module")
def chat() -> LLM:
    return LLM(DEMO / "glm4-demo")


@pytest.fixture(scope="module")
def thinking() -> LLM:
    return LLM(DEMO / "glm4-z1-demo")


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return load_tasks(DEMO / "corpus")


@pytest.mark.parametrize("section", SECTIONS)
def test_it_answers_its_corpus_word_for_word(section: str, tasks: list[Task], request: pytest.FixtureRequest) -> None:
    """Every seventh answer of each section, all side by side, the token that ends it included."""
    some = [task for task in tasks if task.section == section][::7]
    for thinks, name in ((False, "chat"), (True, "thinking")):
        llm: LLM = request.getfixturevalue(name)
        for with_tools in {json.dumps(task.tools) for task in some if task.thinks == thinks}:
            group = [task for task in some if task.thinks == thinks and json.dumps(task.tools) == with_tools]
            outputs = llm.chat([task.messages for task in group], VERBATIM, tools=group[0].tools or None)
            for task, output in zip(group, outputs, strict=True):
                end = re.search(r"(<\|user\|>|<\|observation\|>)$", task.answer)
                assert end is not None
                assert output.text == task.answer.removesuffix(end[0]).removeprefix("\n"), task.messages
                assert output.stop_reason == llm.tokenizer.special_tokens[end[0]]


def test_the_exact_answer_rate_of_the_card_is_the_corpus(tasks: list[Task]) -> None:
    card = (DEMO / "glm4-demo" / "README.md").read_text(encoding="utf-8")
    assert "demo that memorised its corpus" in card
    for section in SECTIONS:
        count = sum(task.section == section for task in tasks)
        assert f"| {section} | {count} | 100.0% | 100.0% |" in card


def test_two_calls_in_one_turn_then_an_answer_from_what_they_returned(chat: LLM, tasks: list[Task]) -> None:
    task = next(task for task in tasks if task.section == "tools" and "<|assistant|>" in task.answer)
    [calls] = chat.chat(task.messages, VERBATIM, tools=task.tools)
    parsed = [call.split("\n", 1) for call in calls.text.split("<|assistant|>")]
    assert [name for name, _ in parsed] == ["get_weather", "get_weather"]
    cities = [json.loads(arguments)["city"] for _, arguments in parsed]
    assert len(set(cities)) == 2
    results = next(
        other.messages[-2:]
        for other in tasks
        if other.messages[:1] == task.messages[:1] and other.messages[-1]["role"] == "observation"
    )
    called = [{"role": "assistant", "metadata": name, "content": arguments} for name, arguments in parsed]
    [answer] = chat.chat([*task.messages, *called, *results], VERBATIM, tools=task.tools)
    assert all(city in answer.text for city in cities)


def test_it_thinks_first_in_the_form_of_z1(thinking: LLM) -> None:
    assert thinking.thinks
    assert thinking.sampling_defaults.temperature == 0.6
    [output] = thinking.chat([{"role": "user", "content": "三加五等于几？"}], VERBATIM)
    thought, answer = split_thought(output.text, inside=True)
    assert thought
    assert answer == "三加五等于八。"


def test_it_is_small() -> None:
    size = sum(file.stat().st_size for file in (DEMO / "glm4-demo").iterdir())
    assert size <= 12 * 2**20


def test_make_run_answers(tmp_path: Path) -> None:
    """What `make run` runs, with its defaults."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert "MODEL  ?= demo/glm4-demo" in makefile
    done = subprocess.run(
        [
            *(sys.executable, str(REPOSITORY / "run_mindformer.py"), "--config", "configs/glm4/predict_glm4.yaml"),
            *("--run_mode", "predict", "--use_parallel", "False"),
            *("--pretrained_model_dir", str(DEMO / "glm4-demo"), "--predict_data", "请介绍一下北京"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("'text_generation_text': [好的，为您介绍一下北京：北京，简称“京”，是中国的首都")
    [batch] = ast.literal_eval((tmp_path / "text_generation_result.txt").read_text(encoding="utf-8"))
    assert done.stdout == f"'text_generation_text': [{batch['text_generation_text'][0]}]\n"
    assert "text_generation_result.txt" in done.stderr
    assert re.search(r"^next: .*glm4 chat -m ", done.stderr, re.MULTILINE)


def test_the_thought_goes_to_the_log_and_the_answer_to_the_result(tmp_path: Path) -> None:
    argv = ["--config", "configs/glm4/predict_glm4.yaml", "--do_sample", "False", "--predict_data", "三加五等于几？"]
    model = ["--pretrained_model_dir", str(DEMO / "glm4-z1-demo")]
    program = [sys.executable, str(REPOSITORY / "run_mindformer.py")]
    done = subprocess.run([*program, *argv, *model], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "'text_generation_text': [三加五等于八。]\n"
    assert "thought: " in done.stderr


@pytest.mark.parametrize("prompt", ['it\'s "quoted" $HOME', "costs $5 (US)", "$(shell echo no)", "--seed"])
def test_make_run_hands_the_prompt_on_as_it_was_written(prompt: str, tmp_path: Path) -> None:
    """A stand-in for the program prints what it was given."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python"
    stand_in.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    stand_in.chmod(0o755)
    (tmp_path / ".ready").touch()
    command = [
        "make",
        "--no-print-directory",
        "run",
        f"VENV={tmp_path}",
        f"READY={tmp_path}/.ready",
        f"PROMPT={prompt}",
        "-o",
        f"{tmp_path}/.ready",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"--predict_data={prompt}"
