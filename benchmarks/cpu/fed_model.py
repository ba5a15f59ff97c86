"""A model larger than the disk: int4 from bfloat16 shards that are made, read and removed one by one.

    python benchmarks/cpu/fed_model.py CONFIG_DIR [--layers N] [--work DIR]

CONFIG_DIR holds config.json and the tokenizer's files, such as those of GLM-4-32B-0414 (65 GB in bfloat16, of which
one layer, 1 GB, is on the disk at a time). Prints the time to load, the largest resident set, seconds a token, and the
share of a plain streaming read that decoding reaches; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from glm4.bench.ceilings import read_speed
from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint, RawTensor, TensorInfo
from glm4.engine.engine import Engine
from glm4.engine.torch_runner import TorchRunner
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.model.utils import TensorSpec, tensor_specs
from glm4.options import GREEDY, EngineOptions, SamplingParams
from glm4.text.tokenizer import Tokenizer

SMALL = 1 << 20
NOISE = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


class FedCheckpoint(Checkpoint):
    """The random weights of a model, a layer's file at a time."""

    def __init__(self, folder: ModelFolder, config: Glm4Config, work: Path) -> None:
        super().__init__(folder, {})
        self._specs = {spec.name: spec for spec in tensor_specs(config)}
        self._infos = {
            spec.name: TensorInfo(spec.name, "BF16", spec.shape, work / shard_of(spec.name), 0, 2 * spec.numel)
            for spec in self._specs.values()
        }
        self._work, self._current, self._opened = work, "", None

    def read(self, name: str) -> RawTensor:
        shard = shard_of(name)
        if shard != self._current:
            self._feed(shard)
        raw = self._opened.read(name)
        if raw.buffer.nbytes > SMALL:
            return raw
        return RawTensor(raw.dtype, raw.shape, memoryview(bytes(raw.buffer)))  # a view would keep the file's space

    def _feed(self, shard: str) -> None:
        self._opened = None
        shutil.rmtree(self._work / "shard", ignore_errors=True)
        (self._work / "shard").mkdir()
        names = [name for name in self._specs if shard_of(name) == shard]
        save_file({name: random_weight(self._specs[name]) for name in names}, self._work / "shard/model.safetensors")
        shutil.copyfile(self.folder.path / "config.json", self._work / "shard/config.json")
        self._opened, self._current = Checkpoint.open(ModelFolder.open(self._work / "shard")), shard

    def release(self, name: str) -> None:
        if shard_of(name) == self._current:
            self._opened.release(name)


def shard_of(name: str) -> str:
    """The file that holds weight `name`: one for each layer, and for each of the large ones beside them."""
    parts = name.split(".")
    return f"layer-{parts[2]}" if parts[1] == "layers" else name


def random_weight(spec: TensorSpec) -> torch.Tensor:
    if len(spec.shape) == 1:
        return torch.ones(spec.shape, dtype=torch.bfloat16)
    repeats = -(-spec.numel // NOISE.numel())
    return NOISE.repeat(repeats)[: spec.numel].view(spec.shape).contiguous()


def peak_bytes() -> dict[str, int]:
    """The largest resident set so far, and the anonymous part of it now, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak": int(status["VmHWM"].split()[0]) << 10, "anonymous": int(status["RssAnon"].split()[0]) << 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--tokenizer", help="folder of the tokenizer, where CONFIG_DIR has none")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        folder = ModelFolder.open(args.config)
        values = folder.read_json("config.json")
        values |= {"num_hidden_layers": args.layers} if args.layers else {}
        config = Glm4Config.from_dict(values, str(folder.path / "config.json"))
        print(json.dumps(run(folder, config, Path(work), args)))


def run(folder: ModelFolder, config: Glm4Config, work: Path, args: argparse.Namespace) -> dict[str, float]:
    started = time.perf_counter()
    done = 0

    def count(name: str) -> None:
        nonlocal done
        done += 1
        if done % 50 == 0:
            print(f"{done} tensors, {time.perf_counter() - started:.0f} s, {peak_bytes()}", flush=True)

    checkpoint = FedCheckpoint(folder, config, work)
    model = load_model(checkpoint, config, torch.device("cpu"), torch.bfloat16, count, args.quantization)
    loaded = time.perf_counter() - started
    tokenizer = Tokenizer.from_folder(args.tokenizer or folder.path)
    runner = TorchRunner(model, 64, 16, tokenizer.unknown_ids(config.vocab_size))
    engine = Engine(runner, tokenizer, GREEDY, config.eos_token_ids, 1024, EngineOptions(model=str(folder.path)))
    engine.add(list(range(1000, 1064)), SamplingParams(max_new_tokens=args.tokens + 1, ignore_eos=True))
    seconds, ceilings, peaks = [], [], peak_bytes()
    while engine.has_work:
        before = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - before)
        peaks = peaks if ceilings else peak_bytes()  # what a plain read takes is not the model's
        ceilings.append(read_speed(torch.device("cpu")))  # memory's speed changes from minute to minute
    weights = sum(2 * spec.numel for spec in tensor_specs(config)) / 1e9
    size = bytes_per_step(model)
    read, ceiling = size / median(seconds[1:]), median(ceilings)
    share = median(size / step / plain for step, plain in zip(seconds[1:], ceilings[1:], strict=True))
    print(
        f"{weights:.1f} GB of bfloat16 fed in {loaded:.0f} s; prefill of 64 tokens {seconds[0]:.2f} s; "
        f"{median(seconds[1:]):.3f} s a token, {read / 1e9:.1f} GB/s, {share:.0%} of a plain read "
        f"({ceiling / 1e9:.1f}); {peaks}"
    )
    return {
        "bf16_bytes": weights * 1e9,
        "load_s": loaded,
        "prefill_64_s": seconds[0],
        "token_s": median(seconds[1:]),
        "read_bytes_per_s": read,
        "ceiling_bytes_per_s": ceiling,
        "share": share,
        **peaks,
    }


def bytes_per_step(model: object) -> int:
    """Bytes of weights that one token reads: all linear layers, and none of the embedding but a row."""
    total = 0
    layers = [getattr(layer, name) for layer in model.layers for name in layer.__slots__ if name.endswith("_proj")]
    for linear in [*layers, model.lm_head]:
        total += linear.nbytes
    return total


if __name__ == "__main__":
    main()
