"""The commands of MindSpore Transformers on the MindSpore backend: the words of the torch backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("mindspore")
REPOSITORY = Path(__file__).parents[2]
RESULT = "text_generation_result.txt"
DEMO = REPOSITORY / "demo" / "glm4-demo"
FLAGS = (
    f"--config {REPOSITORY}/configs/glm4/predict_glm4.yaml --run_mode predict --pretrained_model_dir {DEMO} "
    "--predict_data 请介绍一下北京 --model.model_config.compute_dtype float32"
)


def run(folder: Path, *command: str) -> tuple[str, str]:
    """What a command prints, and the result file that it writes."""
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, (folder / RESULT).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def torch_result(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = str(REPOSITORY / "run_mindformer.py")
    return run(tmp_path_factory.mktemp("torch"), sys.executable, script, *FLAGS.split())[1]


def test_one_card(tmp_path: Path, torch_result: str) -> None:
    script = str(REPOSITORY / "run_mindformer.py")
    _, result = run(tmp_path, sys.executable, script, *FLAGS.split(), "--backend", "mindspore")
    assert result == torch_result


def test_two_cards(tmp_path: Path, torch_result: str) -> None:
    words = f"run_mindformer.py {FLAGS} --backend mindspore --use_parallel True --parallel_config.model_parallel 2"
    printed, result = run(tmp_path, "bash", str(REPOSITORY / "scripts" / "msrun_launcher.sh"), words, "2")
    assert result == torch_result
    assert "text_generation_text" in printed  # rank 0's answer reaches the terminal
    assert {path.name for path in (tmp_path / "output" / "msrun_log").iterdir()} >= {"worker_0.log", "worker_1.log"}


def test_generate_says_the_same(tmp_path: Path, torch_result: str) -> None:
    words = json.loads(torch_result.replace("'", '"'))[0]["text_generation_text"][0]
    program = (sys.executable, "-m", "glm4", "generate", "请介绍一下北京", "-m", str(DEMO), "--backend", "mindspore")
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=True)
    assert words in done.stdout
