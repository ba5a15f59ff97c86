"""OpenVINO's side of `compare.py`: an exported model of random weights in GLM-4-9B's shape, timed on request.

    python benchmarks/cpu/openvino_side.py FOLDER int4 LAYERS THREADS

Runs in the environment that compare.py makes, without glm4. Writes FOLDER if it is not there, and then answers each
line of JSON on standard input with one on standard output.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from lines import answer_lines

DEMO = Path(__file__).resolve().parents[2] / "demo" / "glm4-demo"
GROUP_SIZE = 128


def write_folder(path: Path, weights: str, layers: int) -> None:
    """As its users make one: a Hugging Face folder, exported by optimum with NNCF's 4-bit groups; random weights."""
    import torch
    from transformers import Glm4Config, Glm4ForCausalLM

    source, unfinished = path.with_name(path.name + ".source"), path.with_name(path.name + ".incomplete")
    for folder in (source, unfinished):
        shutil.rmtree(folder, ignore_errors=True)
    torch.set_default_dtype(torch.bfloat16)
    config = Glm4Config(num_hidden_layers=layers, attention_bias=True, partial_rotary_factor=0.5)
    Glm4ForCausalLM(config).save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / file, source / file)
    export = Path(sys.executable).with_name("optimum-cli")
    subprocess.run(
        [export, "export", "openvino", "--model", source, "--task", "text-generation-with-past",
         "--weight-format", weights, "--group-size", str(GROUP_SIZE), "--ratio", "1.0", "--sym", unfinished],
        check=True, stdout=sys.stderr,
    )  # fmt: skip
    shutil.rmtree(source)
    unfinished.rename(path)


class Side:
    def __init__(self, folder: str, threads: int) -> None:
        started = time.perf_counter()
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 1, 8, 2048
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads, "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP_SIZE}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._next_request = 0
        self.serve(1, 8, 2)
        self.load_seconds = time.perf_counter() - started

    def serve(self, requests: int, prompt: int, new: int) -> dict[str, float]:
        """Tokens a second of `requests` that come at once: their prompts, and then their answers."""
        started = time.perf_counter()
        handles = [self._add(prompt, new) for _ in range(requests)]
        waiting = list(handles)
        while waiting:
            self._pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        prefill = time.perf_counter() - started
        steps, started = 0, time.perf_counter()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            steps += 1
        decode = time.perf_counter() - started
        made = sum(len(output.generated_ids) for handle in handles for output in handle.read_all())
        if made != requests * new or steps != new - 1:
            raise RuntimeError(f"OpenVINO made {made} tokens in {1 + steps} steps, not {requests * new} in {new}")
        return {"prefill": requests * prompt / prefill, "decode": requests * (new - 1) / decode}

    def _add(self, prompt: int, new: int) -> Any:
        generation = openvino_genai.GenerationConfig()
        generation.max_new_tokens = generation.min_new_tokens = new
        generation.ignore_eos, generation.do_sample = True, False
        ids = np.array([random.choices(range(256), k=prompt)], np.int64)
        self._next_request += 1
        return self._pipeline.add_request(self._next_request, openvino.Tensor(ids), generation)


def main() -> None:
    folder, weights, layers, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if not folder.exists():
        write_folder(folder, weights, layers)
    answer_lines(f"OpenVINO {weights}", Side(str(folder), threads))


if __name__ == "__main__":
    main()
