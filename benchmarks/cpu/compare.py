"""glm4 and a peer on the same machine, in turn: the same shape (GLM-4-9B's), random weights.

    python benchmarks/cpu/compare.py [--layers 8] [--rounds 5] [--pair int4:Q4_0] [--work build/bench-cpu]

Pairs: int4:Q4_0 and int8:Q8_0 (llama.cpp), int4:openvino-int4 (OpenVINO GenAI). Installs the peer in an environment of
its own (llama.cpp is built from source: 10 to 20 minutes) and writes both models, all under --work; what is there
already is used. Every round times each regime on one side and then the other, and a plain read of memory; the sides
take turns in going first. Prints a table of medians and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
REGIMES = {
    "one request": {"requests": 1, "prompt": 512, "new": 25},
    "eight requests": {"requests": 8, "prompt": 64, "new": 13},
}
ROWS = {
    "prefill, 512 tokens": ("one request", "prefill"),
    "decode, 1 request": ("one request", "decode"),
    "decode, 8 requests": ("eight requests", "decode"),
}
LONG, SHORT = 16384, 512


@dataclass(frozen=True)
class Peer:
    """Another engine: the script of its side, and the environment of its own that this runs in."""

    name: str
    script: str
    modules: str
    """What it imports."""
    packages: tuple[str, ...]
    build: tuple[str, ...] = ()
    """CMake's options, where it is built from source."""
    unwanted: tuple[str, ...] = ()
    """What comes with the packages and is not used."""

    @classmethod
    def of(cls, format: str) -> Peer:
        return OPENVINO if format.startswith("openvino-") else LLAMA_CPP

    def python(self, work: Path) -> Path:
        """Its environment, made if it is not there."""
        environment = work / self.name
        python = environment / "bin" / "python"
        check = [python, "-c", f"import {self.modules}"]
        if python.exists() and not subprocess.run(check, stderr=subprocess.DEVNULL, check=False).returncode:
            return python
        print(f"installing {self.name} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.packages],
            check=True, env=os.environ | {"CMAKE_ARGS": " ".join(self.build)},
        )  # fmt: skip
        if self.unwanted:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *self.unwanted], check=True)
        return python


LLAMA_CPP = Peer(
    "llama.cpp", "llama_cpp_side.py", "llama_cpp, gguf", ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
    ("-DMTMD_BUILD=OFF", "-DLLAVA_BUILD=OFF", "-DLLAMA_BUILD_TOOLS=OFF"),
)  # fmt: skip
OPENVINO = Peer(
    "openvino", "openvino_side.py", "openvino_genai, optimum.intel, nncf",
    ("openvino-genai==2026.4.0.0", "openvino==2026.4.0", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0"),
    unwanted=("torchvision",),  # it loads only beside the one build of torch that it was made with
)  # fmt: skip


@dataclass
class Side:
    """A process that answers lines of JSON."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, python: Path | str, script: str, *arguments: object) -> Side:
        command = [str(python), str(HERE / script), *map(str, arguments)]
        quiet = subprocess.DEVNULL if script == LLAMA_CPP.script else None
        return cls(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True))

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.process.args!r} ended without an answer")
        return dict(json.loads(line))

    def ask(self, do: str, **arguments: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_rounds(ours: Side, theirs: Side, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Everything that was measured, a list of rounds for each; the first round warms up and is dropped."""
    found: dict[str, list[dict[str, Any]]] = {}
    sides = {"ours": ours, "theirs": theirs}
    for number in range(rounds + 1):
        taken: dict[str, dict[str, Any]] = {"read": ours.ask("read")}
        for regime, shape in REGIMES.items():
            for name in list(sides)[:: 1 if number % 2 else -1]:
                taken[f"{name}, {regime}"] = sides[name].ask("serve", **shape)
            taken[f"read after {regime}"] = ours.ask("read")
        for context in (SHORT, LONG):
            taken[f"step at {context}"] = ours.ask("step_at", context=context, steps=5)
        if number:
            for key, value in taken.items():
                found.setdefault(key, []).append(value)
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return found


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of tokens a second, medians of the rounds' own ratios, and shares of the plain read."""
    result: dict[str, Any] = {}
    for row, (regime, phase) in ROWS.items():
        mine, other = ([one[phase] for one in found[f"{name}, {regime}"]] for name in ("ours", "theirs"))
        ratios = [a / b for a, b in zip(mine, other, strict=True)]
        result[row] = {"glm4": median(mine), "peer": median(other), "ratio": median(ratios)}
    reads = [median(kind[i]["bytes_per_s"] for key, kind in found.items() if key.startswith("read"))
             for i in range(len(found["read"]))]  # fmt: skip
    weights = found["read"][0]["weights"]
    shares = [one["decode"] * weights / read for one, read in zip(found["ours, one request"], reads, strict=True)]
    long = [
        b["seconds"] / a["seconds"] for a, b in zip(found[f"step at {SHORT}"], found[f"step at {LONG}"], strict=True)
    ]
    return result | {
        "read_gb_per_s": [round(read / 1e9, 1) for read in reads],
        "decode_share_of_read": median(shares),
        f"step_at_{LONG}_to_{SHORT}_int8_kv": median(long),
    }


def show(result: dict[str, Any], names: list[dict[str, Any]]) -> None:
    print(f"{' and '.join(name['name'] for name in names)}, tokens a second, medians")
    for row in ROWS:
        values = result[row]
        print(f"{row:22} {values['glm4']:9.2f} {values['peer']:9.2f}   {values['ratio']:.2f}x")
    share = result["decode_share_of_read"]
    print(f"plain read {median(result['read_gb_per_s']):.1f} GB/s; decoding one request reads at {share:.0%} of that")
    print(f"step at {LONG} tokens, KV int8: {result[f'step_at_{LONG}_to_{SHORT}_int8_kv']:.2f}x of that at {SHORT}")
    print(f"load and first token: {names[0]['load_seconds']:.1f} s, the peer {names[1]['load_seconds']:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="40 is the whole 9B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pair", action="append", help="ours:theirs, int4:Q4_0 unless told otherwise")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build" / "bench-cpu")
    options = parser.parse_args()
    everything = {}
    for pair in options.pair or ["int4:Q4_0"]:
        quantization, format = pair.split(":")
        peer = Peer.of(format)
        file = format if peer is OPENVINO else f"{format}.gguf"
        places = [options.work / f"9b-{options.layers}-{kind}" for kind in (quantization, file)]
        rest = (options.layers, options.threads)
        ours = Side.start(sys.executable, "our_side.py", places[0], quantization, *rest)
        names = [ours.answer()]
        theirs = Side.start(peer.python(options.work), peer.script, places[1], format.removeprefix("openvino-"), *rest)
        names.append(theirs.answer())
        try:
            result = summary(take_rounds(ours, theirs, options.rounds))
        finally:
            ours.stop()
            theirs.stop()
        show(result, names)
        everything[pair] = result
    print(json.dumps({"layers": options.layers, "rounds": options.rounds, "pairs": everything}))


if __name__ == "__main__":
    main()
