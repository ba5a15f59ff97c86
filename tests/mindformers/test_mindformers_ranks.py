"""run_mindformer.py in several processes, under our launcher and under torchrun: the answers of one process."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "demo" / "glm4-demo"
RESULT = Path("text_generation_result.txt")
PROMPTS = ["请介绍一下北京", "What is the capital of France?", "你好", "3 + 4 = ?", "介绍一下上海", "Who are you?"]


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")


def run(*argv: str) -> tuple[str, object]:
    """Standard output, and the result file."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    result = ast.literal_eval(RESULT.read_text(encoding="utf-8"))
    RESULT.unlink()
    return done.stdout, result


def flags(degree: str = "", batch: int = 2) -> list[str]:
    parallel = ["--use_parallel", "True", f"--parallel_config.{degree}", "2"] if degree else []
    model = ["--pretrained_model_dir", str(DEMO), "--model.model_config.compute_dtype", "float32"]
    wanted = ["--predict_data", "prompts.txt", "--predict_batch_size", str(batch), "--output_dir", f"out-{degree}"]
    return ["--config", "configs/glm4/predict_glm4.yaml", *model, *wanted, *parallel]


def test_answers_are_those_of_one_process() -> None:
    script = str(REPOSITORY / "run_mindformer.py")
    alone = run(sys.executable, script, *flags())
    launcher = ("bash", str(REPOSITORY / "scripts" / "msrun_launcher.sh"))
    assert run(*launcher, " ".join(["run_mindformer.py", *flags("model_parallel")]), "2") == alone
    assert run(*launcher, " ".join(["run_mindformer.py", *flags("data_parallel")]), "2") == alone
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert run(*torchrun, script, *flags("pipeline_stage")) == alone
    for degree, answered in (("model_parallel", 6), ("data_parallel", 3)):
        assert f"answered {answered} prompts" in Path(f"out-{degree}/log/rank_0/info.log").read_text("utf-8")
    assert "answered 3 prompts" in Path("out-data_parallel/log/rank_1/info.log").read_text("utf-8")
    assert Path("out-model_parallel/log/rank_1/info.log").exists()


def test_a_batch_smaller_than_the_copies_of_the_model() -> None:
    script = str(REPOSITORY / "run_mindformer.py")
    alone = run(sys.executable, script, *flags(batch=1))
    command = ("launch", "--nproc", "2", "--", script, *flags("data_parallel", batch=1))
    assert run(sys.executable, "-m", "glm4", *command) == alone
