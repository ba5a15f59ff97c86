"""What drafts gain where a text repeats, and what they cost where nothing can be guessed.

    python benchmarks/speculation.py [--rounds 11] [--new-tokens 96] [--only WORD]

Two engines on the same folder, one with drafts and one without, answer the same requests in turn: medians of the rounds
after the first, which is printed beside them for it holds the trials of a new engine. One thread, and CPU seconds, so
that what else runs on the machine counts little.

Folders: demo/glm4-demo, and random weights of 120 M parameters made on the spot. "text repeats": no layer adds
anything, so each token decides the next and the text goes round in circles. "perfect draft": the first quarter of a
model whose other layers add nothing, so it is always right. "useless draft": as large, and random.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click
import torch
from safetensors.torch import save_file

from glm4 import LLM, SamplingParams
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.utils import tensor_specs

DEMO = Path(__file__).parents[1] / "demo" / "glm4-demo"
MIDDLE = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16, "head_dim": 64}
LAYERS = 8


@dataclass(frozen=True)
class Case:
    name: str
    model: Path
    prompts: list[list[int]]
    sampling: SamplingParams
    draft: Path | None = None


def write_random(folder: Path, layers: int, seed: int, idle_from: int = LAYERS) -> Path:
    """Random bfloat16 weights with the demo's tokenizer; layers from `idle_from` on add nothing to what goes through.

    The same seed gives the same layers, however many there are.
    """
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    settings = json.loads((DEMO / "config.json").read_text("utf-8")) | MIDDLE | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    tensors = {}
    for spec in tensor_specs(Glm4Config.from_dict(settings)):
        numbers = torch.Generator().manual_seed(zlib.crc32(f"{seed} {spec.name}".encode()))
        tensor = torch.empty(spec.shape).normal_(0, 0.05, generator=numbers)
        if len(spec.shape) == 1 and "bias" not in spec.name:
            tensor = torch.ones(spec.shape)
        layer = int(spec.name.split(".")[2]) if ".layers." in spec.name else 0
        if layer >= idle_from and spec.name.endswith(("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")):
            tensor = torch.zeros(spec.shape)
        tensors[spec.name] = tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return folder


def cases(folder: Path, batch: int, new_tokens: int) -> list[Case]:
    """The same for every run: prompts are drawn with a fixed seed."""
    numbers = torch.Generator().manual_seed(batch)
    drawn = torch.randint(0, 3000, (batch, 64), generator=numbers).tolist()
    middle = write_random(folder / f"middle{batch}", LAYERS, seed=1)
    idle = write_random(folder / f"idle{batch}", LAYERS, seed=1, idle_from=LAYERS // 4)
    perfect = write_random(folder / f"perfect{batch}", LAYERS // 4, seed=1)
    useless = write_random(folder / f"useless{batch}", LAYERS // 4, seed=2)
    greedy = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
    noise = replace(greedy, do_sample=True, temperature=1.0, seed=7)
    few_words = replace(noise, logit_bias=tuple((token_id, 100.0) for token_id in range(100, 116)))
    circular = write_random(folder / f"circular{batch}", LAYERS, seed=1, idle_from=0)
    circles = [output.token_ids for output in LLM(circular).generate(drawn, replace(greedy, max_new_tokens=300))]
    demo = LLM(DEMO)
    questions = ["请介绍一下北京", "Tell me about Paris", "为什么天空是蓝色的？", "讲个笑话"] * 2
    asked = [demo.encode_chat([{"role": "user", "content": question}]) for question in questions[:batch]]
    return [
        Case("demo, its answers", DEMO, asked, replace(greedy, ignore_eos=None)),
        Case("demo, noise", DEMO, drawn, replace(noise, temperature=2.0)),
        Case("120M, nothing repeats", middle, drawn, noise),
        Case("120M, misleading repeats", middle, drawn, few_words),
        Case("120M, text repeats", circular, circles, greedy),
        Case("120M, useless draft", middle, drawn, noise, useless),
        Case("120M, perfect draft", idle, drawn, greedy, perfect),
    ]


def measure(case: Case, rounds: int, tokens: int) -> str:
    """One line: seconds a round without and with drafts, the difference, and how many drafts were right."""
    plain = LLM(case.model, prefix_caching=False, threads=1)
    eager = LLM(
        case.model,
        prefix_caching=False,
        threads=1,
        speculative_tokens=tokens,
        speculative_model=None if case.draft is None else str(case.draft),
    )
    seconds: dict[LLM, list[float]] = {plain: [], eager: []}
    for number in range(rounds + 1):
        for llm in (plain, eager) if number % 2 else (eager, plain):
            started = time.process_time()
            llm.generate(case.prompts, case.sampling)
            seconds[llm].append(time.process_time() - started)
    first = seconds[eager][0] / seconds[plain][0] - 1
    off, on = median(seconds[plain][1:]), median(seconds[eager][1:])
    pairs = median(b / a for a, b in zip(seconds[plain][1:], seconds[eager][1:], strict=True))
    speculator = eager.engine.speculator
    assert speculator is not None
    return (
        f"{case.name:26} {len(case.prompts)} requests  off {off:6.3f} s  on {on:6.3f} s  {pairs - 1:+6.1%}"
        f"  (first round {first:+6.1%})  {speculator.confirmed} of {speculator.drafted} drafts right"
    )


@click.command()
@click.option("--rounds", default=11, show_default=True)
@click.option("--new-tokens", default=96, show_default=True)
@click.option("--tokens", default=5, show_default=True, help="speculative_tokens")
@click.option("--only", default="", help="cases whose name holds this")
def main(rounds: int, new_tokens: int, tokens: int, only: str) -> None:
    """Print one line for each case, at batch 1 and 8."""
    with tempfile.TemporaryDirectory() as folder:
        for batch in (1, 8):
            for case in cases(Path(folder), batch, new_tokens):
                if only in case.name:
                    print(measure(case, rounds, tokens), flush=True)


if __name__ == "__main__":
    main()
