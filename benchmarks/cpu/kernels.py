"""The native CPU kernels on the shapes of GLM-4-9B, beside the ceilings of the same minutes.

    python benchmarks/cpu/kernels.py [--threads N] [--rounds N]

Every round takes each measurement once, so that all see the same weather; medians over rounds. A weight is repeated
until the copies exceed the caches. The ceilings, with all threads: a plain read on huge pages, and 8-bit products of
numbers that stay in registers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from glm4.ops.activation import swiglu as readable_swiglu
from glm4.ops.cpu import library
from glm4.ops.cpu.attention import make_paged_batch, paged_attention
from glm4.ops.cpu.layer import add_norm, swiglu
from glm4.ops.cpu.linear import PackedLinear, bf16_linear
from glm4.ops.cpu.memory import huge_page_tensor
from glm4.ops.norm import rms_norm
from glm4.ops.quantized import QuantizedWeight

LAYERS = {"qkv": (4608, 4096), "o": (4096, 4096), "gate_up": (27392, 4096), "down": (4096, 13696)}
TOKENS = (1, 4, 8, 16, 64, 256)
READ_BYTES = 512 << 20
PRODUCT_ROUNDS = 1_000_000


@dataclass
class Measurement:
    """One thing to time: what a call reads and computes, and the seconds of each round."""

    name: str
    call: Callable[[], object]
    read: int = 0
    operations: int = 0
    seconds: list[float] = field(default_factory=list)

    def take(self) -> None:
        start = time.perf_counter()
        self.call()
        self.seconds.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def random_weight(rows: int, inputs: int, bits: int) -> QuantizedWeight:
    group = 128 if bits == 4 else inputs
    stored = inputs * bits // 8
    values = torch.randint(0, 256, (rows, stored), dtype=torch.uint8)
    scales = (torch.rand(rows, inputs // group) * 0.01).half().float()
    return QuantizedWeight(bits, group, values if bits == 4 else values.view(torch.int8), scales)


def linear_measurements() -> list[Measurement]:
    """One block's four matrix products in turn, some blocks one after another."""
    out = []
    for bits in (4, 8):
        blocks = [
            [PackedLinear.pack(random_weight(*shape, bits)) for shape in LAYERS.values()] for _ in range(16 // bits)
        ]
        read = sum(layer.nbytes for block in blocks for layer in block)
        for tokens in TOKENS:
            used = blocks if tokens < 64 else blocks[:1]
            activations = [torch.randn(tokens, inputs).bfloat16() for _, inputs in LAYERS.values()]

            def run(used: list[list[PackedLinear]] = used, activations: list[torch.Tensor] = activations) -> None:
                for block in used:
                    for layer, x in zip(block, activations, strict=True):
                        layer(x)

            operations = 2 * tokens * len(used) * sum(rows * inputs for rows, inputs in LAYERS.values())
            out.append(
                Measurement(f"int{bits} blocks, {tokens} tokens", run, read * len(used) // len(blocks), operations)
            )
    weight = huge_page_tensor((27392, 4096), torch.bfloat16).normal_()
    for tokens in (1, 4, 8):
        x = torch.randn(tokens, 4096).bfloat16()
        operations = 2 * tokens * weight.numel()
        out += [
            Measurement(
                f"bf16 gate_up, {tokens} tokens", lambda x=x: bf16_linear(x, weight), weight.nbytes, operations
            ),
            Measurement(f"  torch, {tokens} tokens", lambda x=x: F.linear(x, weight), weight.nbytes, operations),
        ]
    return out


def attention_measurements() -> list[Measurement]:
    """32 query heads on 2 key/value heads of 128: one token of one request, and a chunk of a prompt."""
    out = []
    for context, new in ((512, 1), (16384, 1), (1024, 512)):
        blocks = (context + new) // 16 + 1
        batch = make_paged_batch([(0, new)], [context], [list(range(blocks))], 16)
        q = torch.randn(new, 32, 128).bfloat16()
        operations = 4 * 32 * 128 * sum(context + t + 1 for t in range(new))
        for dtype in (torch.bfloat16, torch.int8):
            k, v = ((torch.randn(blocks * 16, 2, 128) * 40).to(dtype) for _ in range(2))
            scales = [torch.full((blocks * 16, 2), 0.025)] * 2 if dtype is torch.int8 else []
            read = 2 * (context + new) * k[0].nbytes

            def run(q=q, k=k, v=v, batch=batch, scales=scales) -> None:  # type: ignore[no-untyped-def]
                paged_attention(q, k, v, batch, *scales)

            kind = str(dtype).removeprefix("torch.")
            out.append(Measurement(f"attention {kind}, {new} at {context}", run, read, operations))
        keys, values = (torch.randn(1, 2, context + new, 128).bfloat16() for _ in range(2))
        mask = None if new == 1 else torch.ones(new, context + new, dtype=torch.bool).tril(context)
        queries = q.view(1, 2, 16, 128) if new == 1 else q.transpose(0, 1)[None]
        out.append(
            Measurement(
                f"  torch bfloat16, {new} at {context}",
                lambda a=queries, k=keys, v=values, m=mask, g=new > 1: F.scaled_dot_product_attention(
                    a, k, v, attn_mask=m, enable_gqa=g
                ),
                2 * keys.nbytes,
                operations,
            )
        )
    return out


def layer_measurements() -> list[Measurement]:
    out = []
    weight = torch.ones(4096).bfloat16()
    for tokens in (1, 256):
        x, branch = torch.randn(tokens, 4096).bfloat16(), torch.randn(tokens, 4096).bfloat16()
        gate_up = torch.randn(tokens, 27392).bfloat16()

        def readable(x: torch.Tensor = x, branch: torch.Tensor = branch) -> None:
            rms_norm(x + rms_norm(branch, weight, 1e-5), weight, 1e-5)

        out += [
            Measurement(f"residual + norms, {tokens}", lambda x=x, y=branch: add_norm(x, y, weight, weight, 1e-5)),
            Measurement(f"  torch, {tokens}", readable),
            Measurement(f"SwiGLU, {tokens}", lambda g=gate_up: swiglu(g)),
            Measurement(f"  torch, {tokens}", lambda g=gate_up: readable_swiglu(g)),
        ]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    library.set_threads(options.threads)
    torch.set_num_threads(options.threads)
    kernels = library.need()
    memory = huge_page_tensor((READ_BYTES,), torch.uint8).fill_(1)
    read = Measurement("plain read", lambda: kernels.glm4_read_stream(memory.data_ptr(), READ_BYTES), READ_BYTES)
    operations = kernels.glm4_multiply(PRODUCT_ROUNDS)
    products = Measurement("8-bit products", lambda: kernels.glm4_multiply(PRODUCT_ROUNDS), operations=operations)
    measurements = [read, products, *linear_measurements(), *attention_measurements(), *layer_measurements()]
    for measurement in measurements:
        measurement.call()
    for _ in range(options.rounds):
        for measurement in measurements:
            measurement.take()
    print(f"{library.kernels_summary()}; medians of {options.rounds} rounds, shares of the ceilings")
    print(f"{'':34} {'ms':>9} {'GB/s':>7} {'':>5} {'GOP/s':>7}")
    for m in measurements:
        row = f"{m.name:34} {m.median * 1e3:9.3f} "
        row += rate(m.read, m, READ_BYTES / read.median) + rate(m.operations, m, operations / products.median)
        print(row.rstrip())


def rate(amount: int, measurement: Measurement, ceiling: float) -> str:
    """Billions a second and the share of the ceiling; blank where there is nothing to count."""
    speed = amount / measurement.median
    return f"{speed / 1e9:7.1f} {speed / ceiling:5.0%} " if amount else f"{'':14}"


if __name__ == "__main__":
    main()
