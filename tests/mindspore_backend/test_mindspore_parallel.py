"""Tensor parallel with MindSpore: two processes, started by msrun, against transformers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import SHAPES, write_tiny

from glm4.device_mindspore import MindSporeDevice, adopt_msrun
from glm4.errors import OptionError

TEXTS = [[7, 90, 250, 12, 33, 8, 5, 9, 301, 44, 6, 150], [5, 200, 3, 9]]
SHARED_BY_TWO = {name: shape for name, shape in SHAPES.items() if shape["num_attention_heads"] % 2 == 0} | {
    "1 KV head": {"attention_bias": True, "num_attention_heads": 4, "num_key_value_heads": 1}
}


@pytest.mark.parametrize("mode", ["graph", "PyNative"])
def test_two_ranks_equal_transformers(mindspore: None, tmp_path: Path, mode: str) -> None:
    """Biases, 2 KV heads and 8, one that both ranks need, tied embeddings, YaRN; 321 tokens are not shared evenly."""
    models = {
        str(tmp_path / name): write_tiny(tmp_path / name, vocab_size=321, **shape).theirs
        for name, shape in SHARED_BY_TWO.items()
    }
    (tmp_path / "work.json").write_text(json.dumps(dict.fromkeys(models, TEXTS)))
    ranks = Path(__file__).with_name("ranks.py")
    run(tmp_path, [str(ranks), mode, str(tmp_path / "work.json"), str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    for path, theirs in models.items():
        for text, result, ends in zip(TEXTS, found[path], ([4, 9, 11], [0, 1, 2, 3]), strict=True):
            with torch.no_grad():
                expected = theirs(torch.tensor([text])).logits[0]
            assert (torch.tensor(result["logits"]) - expected).abs().max() <= 1e-4, path
            assert result["picked"] == expected[ends].argmax(-1).tolist(), path


def run(folder: Path, words: list[str]) -> None:
    """Under msrun, with two processes; what they log is shown when they fail."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    logs = folder / "log"
    command = ["--worker_num=2", "--local_worker_num=2", f"--master_port={port}", f"--log_dir={logs}", "--join=True"]
    bin = Path(sys.executable).parent
    done = subprocess.run(
        [str(bin / "msrun"), *command, *words],
        env=os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(file.read_text()[-3000:] for file in sorted(logs.glob("worker_*.log")))


def test_a_degree_without_its_processes_is_refused(mindspore: None) -> None:
    with pytest.raises(OptionError, match=r"tensor_parallel 2, but 1 process started: .*--worker_num=2"):
        MindSporeDevice.open(size=2)


def test_ranks_of_msrun_are_those_of_torchrun() -> None:
    said = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118"}
    environment = said | {"RANK_ID": "3", "DEVICE_ID": "1", "LOCAL_WORLD_SIZE": "2"}
    adopt_msrun(environment)
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "8119")
    unchanged: dict[str, str] = {}
    adopt_msrun(unchanged)
    assert unchanged == {}
    with pytest.raises(OptionError, match="--node_rank"):
        adopt_msrun(said)
