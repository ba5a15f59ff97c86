"""`glm4 batch`, `glm4 bench`, and answers held to a form."""

from __future__ import annotations

from pathlib import Path

from error_cases.table import case
from programs import Bench, Ran

LINE = '{"prompt": "hi", "max_new_tokens": 2}\n'
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:15:46.6805900,3,2\n"


def batch(bench: Bench, *argv: str, lines: str = LINE) -> Ran:
    Path("in.jsonl").write_text(lines)
    return bench.glm4("batch", *(argv or ("in.jsonl", "-o", "out.jsonl")), "-m", str(bench.model))


def throughput(bench: Bench, *argv: str, trace: str = HEADER + ROW) -> Ran:
    Path("trace.csv").write_text(trace)
    return bench.glm4("bench", "throughput", "-m", str(bench.model), *argv)


@case("`glm4 batch` on a file that is not there")
def _(bench: Bench) -> Ran:
    return batch(bench, "none.jsonl", "-o", "out.jsonl")


@case("a file of requests without any")
def _(bench: Bench) -> Ran:
    return batch(bench, lines="\n \n")


@case("the input is named as the output")
def _(bench: Bench) -> Ran:
    return batch(bench, "in.jsonl", "-o", "in.jsonl")


@case("the output of a batch cannot be written")
def _(bench: Bench) -> Ran:
    return batch(bench, "in.jsonl", "-o", "none/out.jsonl")


@case("the output holds something else")
def _(bench: Bench) -> Ran:
    Path("out.jsonl").write_text("my diary\n")
    return batch(bench)


@case("a batch is gone on with other options")
def _(bench: Bench) -> Ran:
    assert batch(bench).code == 0
    return batch(bench, "in.jsonl", "-o", "out.jsonl", "--seed", "7")


@case("a line was edited since the batch was begun")
def _(bench: Bench) -> Ran:
    assert batch(bench).code == 0
    return batch(bench, lines=LINE.replace("hi", "ho"))


@case("`--trace` names a file that is not there")
def _(bench: Bench) -> Ran:
    return throughput(bench, "--trace", "none.csv")


@case("a trace without its columns")
def _(bench: Bench) -> Ran:
    return throughput(bench, "--trace", "trace.csv", trace="when,how_many\n1,2\n")


@case("a row of a trace with a word for a number")
def _(bench: Bench) -> Ran:
    return throughput(bench, "--trace", "trace.csv", trace=HEADER + ROW + ROW.replace(",3,", ",three,"))


@case("a trace of no requests")
def _(bench: Bench) -> Ran:
    return throughput(bench, "--trace", "trace.csv", trace=HEADER)


@case("`--scale-lengths 0`")
def _(bench: Bench) -> Ran:
    return throughput(bench, "--trace", "trace.csv", "--scale-lengths", "0")


@case("`--arrivals trace` without a trace")
def _(bench: Bench) -> Ran:
    return throughput(bench, "--arrivals", "trace")


@case("`bench latency` beyond the context")
def _(bench: Bench) -> Ran:
    return bench.glm4("bench", "latency", "-m", str(bench.model), "--prompt-tokens", "100000")


@case("a regex that is none")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "regex", "a(b")


@case("a regex that looks around")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "regex", "(?=a)b")


@case("a JSON schema that is no JSON")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "json_schema", '{"type": ')


@case("a JSON schema with a keyword that cannot be held")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "json_schema", '{"not": {"type": "string"}}')


@case("a schema that nothing satisfies")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "json_schema", "false")


@case("a grammar with an unknown name")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "grammar", "start: nothing")


@case("a regex that would take too much")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "regex", "(a{1,1000}){1,1000}")


@case("two forms for one answer")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "regex", "a", "-o", "choice", "b")


@case("beam search with a temperature")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "num_beams", "3", "-o", "temperature", "0.5")
