"""Runs `glm4` and `run_mindformer.py` as their users do, in this process or in one of their own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import edit_json
from torch import Tensor

from glm4.cli.main import main as glm4_main
from glm4.mindformers.run import main as mindformer_main

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = "configs/glm4/predict_glm4.yaml"


@dataclass(frozen=True)
class Ran:
    """What a program left behind."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """Its last line on standard error, without "error: ", which is the only line of that kind."""
        *log, last = self.err.splitlines()
        assert "Traceback" not in self.err
        assert not any(line.startswith("error: ") for line in log)
        assert last.startswith("error: ")
        return last.removeprefix("error: ")


class Bench:
    """An empty current folder, a sound model in `model/` below it, and ways to run the programs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capfd = folder, monkeypatch, capfd
        self.model = folder / "model"

    def edit_config(self, **changes: Any) -> None:
        """Set keys of config.json; a value of ... removes the key."""
        edit_json(self.model / "config.json", **changes)

    def edit_shard(self, edit: Callable[[dict[str, Tensor]], None]) -> None:
        """Change the tensors of the shard with the first layer; the index follows."""
        index = self.model / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        name = weight_map["model.layers.0.input_layernorm.weight"]
        tensors = load_file(self.model / name)
        edit(tensors)
        save_file(tensors, self.model / name)
        rest = {tensor: file for tensor, file in weight_map.items() if file != name}
        edit_json(index, weight_map=rest | dict.fromkeys(tensors, name))

    def glm4(self, *argv: str, stdin: bytes = b"", terminal: bool = False) -> Ran:
        """`glm4 argv…` in this process; `terminal`: standard input is one."""
        source = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
        self.monkeypatch.setattr(source, "isatty", lambda: terminal)
        self.monkeypatch.setattr(sys, "stdin", source)
        with pytest.raises(SystemExit) as left:
            glm4_main(argv)
        assert isinstance(left.value.code, int)
        return Ran(left.value.code, *self.capfd.readouterr())

    def generate(self, *flags: str, prompt: str = "hi") -> Ran:
        """`glm4 generate` with the model."""
        return self.glm4("generate", prompt, "-m", str(self.model), "-o", "max_new_tokens", "2", *flags)

    def mindformer(self, *flags: str, config: str = CONFIG) -> Ran:
        """`run_mindformer.py` with the model and a prompt; flags given here count more."""
        model = ("--pretrained_model_dir", str(self.model), "--generation_config.max_new_tokens", "2")
        return self.bare_mindformer("--config", config, *model, "--predict_data", "hi", *flags)

    def bare_mindformer(self, *argv: str) -> Ran:
        """`run_mindformer.py argv…`."""
        return Ran(mindformer_main(argv, REPOSITORY), *self.capfd.readouterr())

    def yaml(self, text: str) -> Ran:
        """`run_mindformer.py` with this YAML file."""
        Path("job.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
        return self.mindformer(config="job.yaml")

    def prompts(self, data: bytes, *flags: str) -> Ran:
        """`run_mindformer.py` with this file of prompts."""
        Path("prompts.txt").write_bytes(data)
        return self.mindformer("--predict_data", "prompts.txt", *flags)

    def both(self) -> Ran:
        """The model through both programs, which must say the same."""
        ran, other = self.generate(), self.mindformer()
        assert (ran.code, ran.message) == (other.code, other.message)
        return ran


def start(*argv: str, **streams: Any) -> subprocess.Popen[bytes]:
    """A program of its own, `glm4 …` where the first word is no file; its standard error can be read."""
    program = [str(REPOSITORY / argv[0])] if argv[0].endswith(".py") else ["-m", "glm4", argv[0]]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    return subprocess.Popen([sys.executable, *program, *argv[1:]], stderr=subprocess.PIPE, env=environment, **streams)


def finish(process: subprocess.Popen[bytes]) -> Ran:
    """What a started program leaves behind."""
    out, err = process.communicate(timeout=60)
    return Ran(process.returncode, (out or b"").decode(), err.decode())
