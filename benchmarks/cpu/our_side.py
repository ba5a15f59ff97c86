"""glm4's side of `compare.py`: a packed folder of random weights in GLM-4-9B's shape, timed on request.

    python benchmarks/cpu/our_side.py FOLDER int4|int8 LAYERS THREADS

Writes FOLDER if it is not there, and then answers each line of JSON on standard input with one on standard output.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import torch
from lines import answer_lines

from glm4 import LLM
from glm4.bench.load import Job
from glm4.bench.run import drive
from glm4.engine.step import RequestStep, StepPlan
from glm4.engine.torch_runner import TorchRunner
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.utils import shapes_of
from glm4.ops.cpu import library
from glm4.ops.cpu.memory import huge_page_tensor
from glm4.options import GREEDY
from glm4.quantization.layout import Layout, chosen_layouts
from glm4.quantization.packed import Packed, stored_parts
from glm4.quantization.packed_writer import SafetensorsWriter

DEMO = Path(__file__).resolve().parents[2] / "demo" / "glm4-demo"
NINE_B = {
    "architectures": ["Glm4ForCausalLM"],
    "model_type": "glm4",
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151552,
}
READ_BYTES = 512 << 20
BLOCK = 16


def write_folder(path: Path, quantization: str, layers: int) -> None:
    """What a tensor holds is random, of the size that real weights have."""
    unfinished = path.with_name(path.name + ".incomplete")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / file, unfinished / file)
    values = NINE_B | {"num_hidden_layers": layers}
    packed = values | {"quantization_config": Packed.settings(quantization, 128)}
    (unfinished / "config.json").write_text(json.dumps(packed), encoding="utf-8")
    shapes = shapes_of(Glm4Config.from_dict(values))
    layouts = chosen_layouts(shapes, quantization)
    room = {
        f"{name}.{part}": ("F32", shape) for name, shape in shapes.items() for part in ("values", "scales", "zeros")
    }
    with SafetensorsWriter(unfinished / "model.safetensors", room) as file:
        for name, shape in shapes.items():
            for full_name, tensor in random_weight(name, shape, layouts.get(name)).items():
                file.write(full_name, tensor)
    unfinished.rename(path)


def random_weight(name: str, shape: tuple[int, ...], layout: Layout | None) -> dict[str, torch.Tensor]:
    if layout is None:
        numbers = torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape) * 0.02
        return {name: numbers.bfloat16()}
    shapes = {part: part_shape for part, (_, part_shape) in stored_parts(layout, shape).items()}
    scale = 0.02 / (4.6 if layout.bits == 4 else 74)
    tensors = {
        f"{name}.values": torch.randint(0, 256, shapes["values"], dtype=torch.uint8),
        f"{name}.scales": torch.full(shapes["scales"], scale, dtype=torch.float16),
    }
    return tensors | ({f"{name}.zeros": torch.full(shapes["zeros"], 8, dtype=torch.uint8)} if layout.zeros else {})


class Side:
    def __init__(self, folder: str, threads: int) -> None:
        started = time.perf_counter()
        self._llm = LLM(folder, threads=threads, max_model_len=4096, max_batch_requests=8, prefix_caching=False)
        self.serve(1, 8, 2)
        self.load_seconds = time.perf_counter() - started
        self._memory = huge_page_tensor((READ_BYTES,), torch.uint8).fill_(1)
        self._long: TorchRunner | None = None

    def serve(self, requests: int, prompt: int, new: int) -> dict[str, float]:
        """Tokens a second of `requests` that come at once: their prompts, and then their answers."""
        jobs = [Job(prompt, new)] * requests
        prompts = [random.choices(range(256), k=prompt) for _ in jobs]
        stats = drive(self._llm.engine, jobs, prompts).stats
        return {
            "prefill": stats.prefill_tokens / stats.prefill_seconds,
            "decode": stats.decode_tokens / stats.decode_seconds,
        }

    def read(self) -> dict[str, float]:
        """Bytes a second of a plain read, and those of weights that a token needs."""
        model, started = self._llm.model, time.perf_counter()
        library.need().glm4_read_stream(self._memory.data_ptr(), READ_BYTES)
        seconds = time.perf_counter() - started
        linears = [
            linear
            for layer in model.layers
            for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
        ]
        weights = sum(linear.nbytes for linear in (*linears, model.lm_head))  # type: ignore[attr-defined]
        return {"bytes_per_s": READ_BYTES / seconds, "weights": weights}

    def step_at(self, context: int, steps: int) -> dict[str, float]:
        """Median seconds of a step of one request with `context` tokens behind it; KV in int8, of random content."""
        blocks = NINE_B["max_position_embeddings"] // BLOCK  # type: ignore[operator]
        if self._long is None:
            self._long = TorchRunner(self._llm.model, blocks, BLOCK, [], torch.int8)
            for cache in (cache for pair in self._long._kv_cache for cache in pair):
                cache.data.random_(-127, 128)
                cache.scales.fill_(0.01)
            first = RequestStep(0, [1], 0, [0], [0], sampling=GREEDY, prompt_len=1)
            self._long.execute(StepPlan([first]))
        seconds = []
        for position in range(context, context + steps):
            started = time.perf_counter()
            self._long.execute(StepPlan([RequestStep(0, [1], position, list(range(blocks)), [0])]))
            seconds.append(time.perf_counter() - started)
        return {"seconds": median(seconds)}


def main() -> None:
    folder, quantization, layers, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if not folder.exists():
        write_folder(folder, quantization, layers)
    side = Side(str(folder), threads)
    answer_lines(f"glm4 {quantization} ({library.kernels_summary()})", side)


if __name__ == "__main__":
    main()
