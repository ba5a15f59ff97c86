"""`glm4 quantize`: the folder it writes, what happens when it cannot, and what `verify` and `plan` say of it."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from programs import REPOSITORY, Bench, finish, start
from safetensors import safe_open
from tiny import write_tiny_chat

from glm4.cli.verify import cost
from glm4.quantization import packed_writer

DEMO = str(REPOSITORY / "demo" / "glm4-demo")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_folder_answers_like_its_source_quantised_while_loading(bench: Bench, quantization: str) -> None:
    ran = bench.glm4("quantize", DEMO, "made/packed", "--quantization", quantization)
    assert ran.code == 0
    assert ran.out == "made/packed\n"
    assert "glm4 generate -m made/packed" in ran.err
    ask = ("generate", "请介绍一下北京", "-o", "max_new_tokens", "24")
    ours, theirs = bench.glm4(*ask, "-m", "made/packed"), bench.glm4(*ask, "-m", DEMO, "--quantization", quantization)
    assert ours == theirs
    assert "北京" in ours.out


def test_other_programs_can_read_the_file(bench: Bench) -> None:
    """It is an ordinary safetensors file, its tensors aligned, and the config says how they are to be taken."""
    bench.glm4("quantize", DEMO, "packed", "--group-size", "64")
    settings = json.loads(Path("packed/config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "glm4", "format_version": 2, "quantization": "int4", "group_size": 64}
    with safe_open("packed/model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    with safe_open(f"{DEMO}/model-00001-of-00002.safetensors", "pt") as file:
        original = file.get_tensor("model.layers.0.mlp.down_proj.weight").float()
    values, scales, zeros = (
        tensors[f"model.layers.0.mlp.down_proj.weight.{part}"] for part in ("values", "scales", "zeros")
    )
    rows, inputs = torch.arange(256)[:, None], torch.arange(640)[None]
    both = values[rows // 32, inputs // 4 * 64 + rows % 16 * 4 + inputs % 4]
    integers = torch.where(rows % 32 < 16, both % 16, both // 16).float()
    scale, zero = (part[rows // 32, inputs // 64, rows % 32].float() for part in (scales, zeros))
    assert scales.shape == zeros.shape == (256 // 32, 640 // 64, 32)
    assert (scale * (integers - zero) - original).norm() < 0.09 * original.norm()
    header = Path("packed/model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    entries = json.loads(header[8 : 8 + length])
    assert entries.pop("__metadata__") == {"format": "pt"}
    assert all((8 + length + entry["data_offsets"][0]) % 64 == 0 for entry in entries.values())


def test_what_belongs_to_the_text_is_copied(bench: Bench) -> None:
    (bench.model / "LICENSE").write_text("free")
    (bench.model / "notes.md").write_text("mine")
    bench.glm4("quantize", "model", "packed")
    copied = {path.name for path in Path("packed").iterdir()}
    weights = {path.name for path in bench.model.glob("*.safetensors*")}
    assert copied == {path.name for path in bench.model.iterdir()} - weights - {"notes.md"} | {"model.safetensors"}
    for name in copied - {"config.json", "model.safetensors"}:
        assert (Path("packed") / name).read_bytes() == (bench.model / name).read_bytes()
    before, after = (json.loads((Path(folder) / "config.json").read_text()) for folder in ("model", "packed"))
    assert after.pop("quantization_config")
    assert after == before


def test_an_empty_folder_may_be_there(bench: Bench) -> None:
    Path("packed").mkdir()
    assert bench.glm4("quantize", "model", "packed/").code == 0
    assert Path("packed/model.safetensors").exists()


def test_nothing_is_left_of_a_run_that_failed(bench: Bench) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    bench.monkeypatch.setattr(packed_writer.SafetensorsWriter, "write", full)
    assert bench.glm4("quantize", "model", "packed").code == 7
    assert [path.name for path in bench.folder.iterdir()] == ["model"]


def test_ctrl_c_leaves_no_half_folder(bench: Bench) -> None:
    write_tiny_chat(bench.folder / "large", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    process = start("quantize", "large", "packed", stdin=subprocess.DEVNULL)
    while not Path("packed.incomplete/model.safetensors").exists():
        assert process.poll() is None
    assert not Path("packed").exists()
    process.send_signal(signal.SIGINT)
    ran = finish(process)
    assert (ran.code, ran.message) == (130, "interrupted")
    assert not list(bench.folder.glob("packed*"))


def test_plan_of_a_packed_folder_is_what_it_loads(bench: Bench) -> None:
    bench.monkeypatch.setenv("COLUMNS", "200")
    bench.glm4("quantize", DEMO, "packed")
    packed, source = bench.glm4("plan", "packed"), bench.glm4("plan", DEMO, "--quantization", "int4")
    assert "4.0 MiB in int4 " in packed.out
    assert "8.6 MiB in bfloat16, 17.1 MiB in float32, 5.2 MiB in int8, 4.0 MiB in int4" in source.out
    fits = [[line for line in ran.out.splitlines() if " 24 GiB " in line] for ran in (packed, source)]
    assert len(fits[0]) == 1
    assert fits[0] == fits[1]
    loaded = finish(
        start("generate", "hi", "-m", "packed", "-v", "-o", "max_new_tokens", "1", stdin=subprocess.DEVNULL)
    )
    assert "packed, int4 on cpu: weights 4.0 MiB" in loaded.err


def test_verify_says_what_it_costs(bench: Bench) -> None:
    """int8 moves words less than int4, and a packed folder as much as its source quantised while loading."""
    few = ("--tokens", "8", "--prompt", "请介绍一下北京")
    bench.glm4("quantize", DEMO, "packed")
    int8 = bench.glm4("verify", DEMO, "--quantization", "int8", *few)
    int4 = bench.glm4("verify", DEMO, "--quantization", "int4", *few)
    packed = bench.glm4("verify", "packed", "--against", DEMO, *few)
    assert int8.code == int4.code == packed.code == 0
    assert "level" not in int4.out
    assert f"{DEMO} in int4, 16 positions, against {DEMO} in float32:" in int4.out
    assert packed.out.splitlines()[1:] == int4.out.splitlines()[1:]

    def divergence(report: str) -> float:
        return float(report.partition("KL divergence, mean")[2].split()[0])

    assert 0 < divergence(int8.out) < divergence(int4.out) / 3
    assert divergence(int4.out) < 0.3


class Recorded:
    """Stands for the original: the logits of every sequence are known."""

    def __init__(self, known: dict[tuple[int, ...], torch.Tensor]) -> None:
        self.known = known

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        return self.known[tuple(token_ids)]


def test_the_cost_by_hand() -> None:
    """Two positions alike; one where 3/4 to 1/4 became 1/2 to 1/2, its best token the other one."""
    even, known = torch.zeros(2), torch.log(torch.tensor([0.25, 0.75]))
    theirs = Recorded({(5, 6): torch.stack([even, known]), (7,): known[None]})
    ours = [torch.stack([even, even]), known[None]]
    found = cost(ours, [[6], []], [[5], [7]], theirs)
    divergence = 0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(torch.tensor(0.5))
    assert found.positions == 3
    assert found.kl == pytest.approx(float(divergence) / 3, abs=1e-6)
    assert found.worst_kl == pytest.approx(float(divergence), abs=1e-6)
    assert found.top1 == pytest.approx(2 / 3)
