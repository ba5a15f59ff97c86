"""llama.cpp's side of `compare.py`: a GGUF of random weights in GLM-4-9B's shape, timed on request.

    python benchmarks/cpu/llama_cpp_side.py FILE Q4_0|Q8_0 LAYERS THREADS

Runs in the environment that compare.py makes, without glm4. Writes FILE if it is not there, and then answers each line
of JSON on standard input with one on standard output.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from lines import answer_lines

HIDDEN, FEED_FORWARD, VOCABULARY, HEAD_DIM, HEADS, KV_HEADS = 4096, 13696, 151552, 128, 32, 2
TOKENS_A_STEP = 2048

Entry = tuple[str, tuple[int, int] | tuple[int], gguf.GGMLQuantizationType]


def entries(format: gguf.GGMLQuantizationType, layers: int) -> Iterator[Entry]:
    """Name, shape and format of each tensor; with Q4_0 the output head is in Q6_K, as llama-quantize leaves it."""
    whole, types = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType
    yield "token_embd.weight", (VOCABULARY, HIDDEN), format
    yield "output.weight", (VOCABULARY, HIDDEN), types.Q6_K if format is types.Q4_0 else format
    yield "output_norm.weight", (HIDDEN,), whole
    for layer in range(layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            yield f"{block}{norm}.weight", (HIDDEN,), whole
        for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS), ("attn_v", KV_HEADS)):
            yield f"{block}{name}.weight", (heads * HEAD_DIM, HIDDEN), format
            yield f"{block}{name}.bias", (heads * HEAD_DIM,), whole
        yield f"{block}attn_output.weight", (HIDDEN, HEADS * HEAD_DIM), format
        yield f"{block}ffn_up.weight", (2 * FEED_FORWARD, HIDDEN), format
        yield f"{block}ffn_down.weight", (HIDDEN, FEED_FORWARD), format


def random_tensor(shape: tuple[int, ...], format: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of random bytes with a small scale, the same ones again and again: speed does not depend on them."""
    if format is gguf.GGMLQuantizationType.F32:
        return np.ones(shape, np.float32)
    numbers, size = gguf.GGML_QUANT_SIZES[format]
    blocks = np.random.default_rng(0).integers(0, 256, (1 << 16, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.0003 if format.name == "Q8_0" else 0.003).tobytes(), np.uint8)
    at = slice(-2, None) if format is gguf.GGMLQuantizationType.Q6_K else slice(0, 2)
    blocks[:, at] = scale
    return np.resize(blocks, (int(np.prod(shape)) // numbers, size)).reshape(shape[0], -1)


def write_file(path: Path, format_name: str, layers: int) -> None:
    format = gguf.GGMLQuantizationType[format_name]
    unfinished = path.with_name(path.name + ".incomplete")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(unfinished, "glm4")
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("glm4")
    writer.add_token_list([f"<{i}>" for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(151329)
    for name, shape, kind in entries(format, layers):
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        floats = kind is gguf.GGMLQuantizationType.F32
        stored = shape if floats else (shape[0], shape[1] // numbers * size)
        element = np.dtype(np.float32 if floats else np.uint8)
        raw = None if floats else kind
        writer.add_tensor_info(name, stored, element, int(np.prod(stored)) * element.itemsize, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, kind in entries(format, layers):
        writer.write_tensor_data(random_tensor(shape, kind))
    writer.close()
    unfinished.rename(path)


class Side:
    def __init__(self, file: str, threads: int) -> None:
        started = time.perf_counter()
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_mmap = False
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), options)
        self._threads = threads
        self._batch = llama_cpp.llama_batch_init(TOKENS_A_STEP, 0, 1)
        self.serve(1, 8, 2)
        self.load_seconds = time.perf_counter() - started

    def serve(self, requests: int, prompt: int, new: int) -> dict[str, float]:
        """Tokens a second of `requests`: their prompts, and then all next tokens together. No token is picked."""
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = requests * -(-(prompt + new) // 256) * 256
        options.n_batch, options.n_ubatch, options.n_seq_max = TOKENS_A_STEP, 512, requests
        options.n_threads = options.n_threads_batch = self._threads
        context = llama_cpp.llama_init_from_model(self._model, options)
        self._decode(context, [(0, 0, True)])  # memory for the graph is taken outside the time
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        started = time.perf_counter()
        for request in range(requests):
            self._decode(context, [(position, request, position == prompt - 1) for position in range(prompt)])
        prefill = time.perf_counter() - started
        started = time.perf_counter()
        for position in range(prompt, prompt + new - 1):
            self._decode(context, [(position, request, True) for request in range(requests)])
        decode = time.perf_counter() - started
        llama_cpp.llama_free(context)
        return {"prefill": requests * prompt / prefill, "decode": requests * (new - 1) / decode}

    def _decode(self, context: Any, tokens: list[tuple[int, int, bool]]) -> None:
        """tokens: position, request, whether its logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (position, request, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = random.randrange(150_000), position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, request
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not compute a step")
        llama_cpp.llama_synchronize(context)


def main() -> None:
    file, format, layers, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if not file.exists():
        write_file(file, format, layers)
    answer_lines(f"llama.cpp {format}", Side(str(file), threads))


if __name__ == "__main__":
    main()
