"""What holds for every command of `glm4`."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import fields

import click
import pytest
from programs import REPOSITORY, Bench

from glm4.cli.main import COMMANDS, cli
from glm4.options import EngineOptions, SamplingParams

LIGHT = """
import runpy, sys
sys.argv = ["glm4", *sys.argv[1:]]
try:
    runpy.run_module("glm4", run_name="__main__", alter_sys=True)
finally:
    heavy = {"torch", "transformers", "tokenizers", "numpy", "jinja2", "huggingface_hub", "rich"} & set(sys.modules)
    print("heavy:", *heavy, file=sys.stderr)
"""


def options_of(name: str) -> list[str]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return [spelling for option in command.params if isinstance(option, click.Option) for spelling in option.opts]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option_and_an_example(bench: Bench, name: str) -> None:
    ran = bench.glm4(name, "--help")
    assert ran.code == 0
    words = ran.out.replace(",", " ").split()
    assert [option for option in options_of(name) if option not in words] == []
    assert f"glm4 {name}" in ran.out.partition("Examples:")[2]


def test_help_of_generate_lists_every_engine_and_sampling_option(bench: Bench) -> None:
    words = bench.glm4("generate", "-h").out.replace(",", " ").split()
    not_shown = {"n", "best_of", "logprobs", "prompt_logprobs"}  # they ask for more than the words of one answer
    assert {o.name for o in fields(SamplingParams) if o.name not in words} == not_shown
    assert [o.name for o in fields(EngineOptions) if "--" + o.name.replace("_", "-") not in words] == []


def test_help_without_arguments_and_with_every_command(bench: Bench) -> None:
    ran = bench.glm4()
    assert ran == bench.glm4("--help") == bench.glm4("-h") == bench.glm4("help")
    assert ran.code == 0
    listed = ran.out.partition("Commands:")[2]
    assert [name for name in COMMANDS if f"\n  {name} " not in listed] == []
    assert "..." not in listed


def test_version(bench: Bench) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    assert bench.glm4("--version").out.split()[-1] == project["version"]


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["chat", "-h"], ["--version"], ["hi"]])
def test_nothing_heavy_is_imported_before_a_model_is_named(argv: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    environment.pop("GLM4_MODEL", None)
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
    )
    assert done.stderr.splitlines()[-1] == "heavy:"


def test_debug_shows_the_traceback_and_keeps_the_exit_code(bench: Bench) -> None:
    plain, debug = bench.glm4("plan", "nowhere"), bench.glm4("plan", "nowhere", "--debug")
    assert "Traceback" not in plain.err
    assert debug.err.startswith("Traceback")
    assert debug.err.endswith(plain.err)
    assert debug.code == plain.code == 3
    bench.monkeypatch.setenv("GLM4_DEBUG", "1")
    assert bench.glm4("plan", "nowhere").err.startswith("Traceback")


def test_debug_after_two_dashes_is_text(bench: Bench) -> None:
    assert "Traceback" not in bench.glm4("generate", "-m", "nowhere", "--", "--debug").err


def test_a_bug_is_called_one(bench: Bench) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    bench.monkeypatch.setattr("glm4.cli.plan._read_config", broken)
    ran = bench.glm4("plan", "model")
    assert (ran.code, ran.message) == (1, "ZeroDivisionError: by zero (a bug; --debug shows where)")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(bench: Bench, shell: str) -> None:
    ran = bench.glm4("completion", shell)
    assert ran.code == 0
    assert f"_GLM4_COMPLETE={shell}_complete" in ran.out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=ran.out.encode(), check=True)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("glm4 ge", {"generate"}),
        (
            "glm4 generate --max",
            {"--max-device-memory", "--max-model-len", "--max-batch-tokens", "--max-batch-requests"},
        ),
        ("glm4 completion f", {"fish"}),
    ],
)
def test_completion(words: str, completed: set[str]) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY / "src"),
        "_GLM4_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run([sys.executable, "-m", "glm4"], capture_output=True, text=True, env=environment)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == completed
