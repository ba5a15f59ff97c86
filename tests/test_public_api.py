"""What `from glm4 import …` offers, and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import glm4

BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is forbidden here")
sys.meta_path.insert(0, Refuse())
"""


def run_without(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter in which the packages `blocked` cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked) + code], capture_output=True, text=True, check=False
    )


def test_public_names() -> None:
    assert sorted(glm4.__all__) == ["AsyncLLM", "Glm4Error", "LLM", "RequestOutput", "SamplingParams", "__version__"]
    assert set(glm4.__all__) <= set(dir(glm4))
    for name in glm4.__all__:
        assert getattr(glm4, name) is not None
    with pytest.raises(AttributeError):
        _ = glm4.Nonsense


def test_blocking_works() -> None:
    assert "torch is forbidden here" in run_without({"torch"}, "import torch").stderr


@pytest.mark.parametrize(
    "module",
    [
        "glm4",
        "glm4.options",
        "glm4.text.chat",
        "glm4.text.detokenizer",
        "glm4.checkpoint.safetensors_reader",
        "glm4.checkpoint.hub",
        "glm4.plan",
        "glm4.engine.scheduler",
        "glm4.engine.kv_cache",
        "glm4.engine.step",
        "glm4.mindformers.config",
        "glm4.cli.main",
    ],
)
def test_needs_no_tensor_library(module: str) -> None:
    done = run_without({"torch", "numpy", "transformers"}, f"import {module}")
    assert done.returncode == 0, done.stderr


def test_the_program_runs_without_transformers() -> None:
    done = run_without({"transformers"}, "import glm4.engine.llm, glm4.cli.verify, glm4.mindformers.run")
    assert done.returncode == 0, done.stderr
