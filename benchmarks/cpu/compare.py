"""glm4 and llama.cpp on the same machine, in turn: the same shape (GLM-4-9B's), random weights.

    python benchmarks/cpu/compare.py [--layers 8] [--rounds 5] [--pair int4:Q4_0] [--work build/bench-cpu]

Installs llama.cpp (llama-cpp-python, built from source: 10 to 20 minutes) in an environment of its own and writes both
models, all under --work; what is there already is used. Every round times each regime on one side and then the other,
and a plain read of memory; the sides take turns in going first. Prints a table of medians and one line of JSON.
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
PEER_PACKAGES = ["llama-cpp-python==0.3.36", "gguf==0.19.0"]
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


@dataclass
class Side:
    """A process that answers lines of JSON."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, python: Path | str, script: str, *arguments: object) -> Side:
        command = [str(python), str(HERE / script), *map(str, arguments)]
        quiet = subprocess.DEVNULL if "llama" in script else None
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


def peer_python(work: Path) -> Path:
    """llama.cpp's environment, made if it is not there."""
    environment = work / "llama.cpp"
    python = environment / "bin" / "python"
    installed = (
        python.exists()
        and not subprocess.run(
            [python, "-c", "import llama_cpp, gguf"], stderr=subprocess.DEVNULL, check=False
        ).returncode
    )
    if not installed:
        print("building llama.cpp …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        built = " ".join(f"-D{part}=OFF" for part in ("MTMD_BUILD", "LLAVA_BUILD", "LLAMA_BUILD_TOOLS"))
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEER_PACKAGES],
            check=True, env=os.environ | {"CMAKE_ARGS": built},
        )  # fmt: skip
    return python


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
        result[row] = {"glm4": median(mine), "llama.cpp": median(other), "ratio": median(ratios)}
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
        print(f"{row:22} {values['glm4']:9.2f} {values['llama.cpp']:9.2f}   {values['ratio']:.2f}x")
    share = result["decode_share_of_read"]
    print(f"plain read {median(result['read_gb_per_s']):.1f} GB/s; decoding one request reads at {share:.0%} of that")
    print(f"step at {LONG} tokens, KV int8: {result[f'step_at_{LONG}_to_{SHORT}_int8_kv']:.2f}x of that at {SHORT}")
    print(f"load and first token: {names[0]['load_seconds']:.1f} s, llama.cpp {names[1]['load_seconds']:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="40 is the whole 9B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pair", action="append", help="ours:theirs, such as int4:Q4_0 (default) or int8:Q8_0")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build" / "bench-cpu")
    options = parser.parse_args()
    python, everything = peer_python(options.work), {}
    for pair in options.pair or ["int4:Q4_0"]:
        quantization, format = pair.split(":")
        places = [options.work / f"9b-{options.layers}-{kind}" for kind in (quantization, format + ".gguf")]
        rest = (options.layers, options.threads)
        ours = Side.start(sys.executable, "our_side.py", places[0], quantization, *rest)
        names = [ours.answer()]
        theirs = Side.start(python, "llama_cpp_side.py", places[1], format, *rest)
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
