"""`glm4 bench`: how fast a model answers on this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from glm4.cli.common import Command, engine_options, load, model_option, verbose_option
from glm4.errors import OptionError
from glm4.options import EngineOptions, options_from

if TYPE_CHECKING:
    from rich.progress import Progress

    from glm4.bench.ceilings import Ceilings
    from glm4.bench.run import Json, Run
    from glm4.engine.llm import LLM

_WARM_UP = 2
"""Requests before the clock starts: the first ones page weights in and let the allocator settle."""


@click.group("bench", short_help="measure latency and throughput")
def command() -> None:
    """Measure how fast a model answers here. A table for people, and one line of JSON at the very end.

    \b
    Examples:
      glm4 bench latency -m /path/hf_dir --prompt-tokens 512 --new-tokens 128
      glm4 bench throughput -m DIR --requests 100 --rate 2
      glm4 bench throughput -m DIR --trace AzureLLMInferenceTrace_conv.csv --arrivals trace --scale-lengths 0.1
    """


def _shared_options(command: Command) -> Command:
    for option in (
        engine_options,
        verbose_option,
        click.option("--no-ceilings", is_flag=True, help="do not measure what the machine could do at best"),
        click.option("--bench-seed", type=int, default=0, show_default=True, help="seed of lengths, times and prompts"),
        model_option,
    ):
        command = option(command)
    return command


@command.command("latency", short_help="one request at a time")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="length of the prompt")
@click.option("--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="length of the answer")
@click.option("--rounds", type=click.IntRange(5), default=5, show_default=True, help="how often, after a warm-up")
@_shared_options
def latency(
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    model: str | None,
    bench_seed: int,
    no_ceilings: bool,
    **options: Any,
) -> None:
    """Time one request at a time: first token, token to token, end to end.

    \b
    Examples:
      glm4 bench latency -m /path/hf_dir
      glm4 bench latency -m DIR --prompt-tokens 4096 --new-tokens 64 --dtype bfloat16
    """
    ceilings = _measure(model, options) if model and not no_ceilings else None
    llm = load(model, options)
    from glm4.bench.load import Job, random_prompts
    from glm4.bench.run import drive, joined, report

    if prompt_tokens + new_tokens > llm.max_model_len:
        raise OptionError(
            f"--prompt-tokens {prompt_tokens} and --new-tokens {new_tokens} do not fit: this model and this memory "
            f"hold {llm.max_model_len} tokens for prompt and answer together"
        )
    jobs = [Job(prompt_tokens, new_tokens)] * (_WARM_UP + rounds)
    prompts = random_prompts(jobs, llm.tokenizer, bench_seed)
    with _progress() as progress:
        runs = [drive(llm.engine, jobs[:1], [prompt]) for prompt in progress.track(prompts, description="latency")]
    run = joined(runs[_WARM_UP:])
    found = {"benchmark": "latency", **_conditions(llm), "rounds": rounds, **report(run)}
    _show(llm, run, found, ceilings)


@command.command("throughput", short_help="many requests at once, or as they arrive")
@click.option("--requests", "count", type=click.IntRange(1), default=100, show_default=True, help="how many")
@click.option("--trace", metavar="CSV", help="lengths and times of an Azure LLM inference trace")
@click.option("--scale-lengths", type=float, default=1.0, show_default=True, help="multiply all lengths by this")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="mean, without --trace")
@click.option("--new-tokens", type=click.IntRange(1), default=128, show_default=True, help="mean, without --trace")
@click.option("--rate", type=float, metavar="R", help="requests a second, as a Poisson process [default: all at once]")
@click.option("--arrivals", type=click.Choice(["trace"]), help="requests come when the trace says")
@click.option("--shared-prefix", type=click.IntRange(0), default=0, metavar="N", help="tokens that all prompts share")
@_shared_options
def throughput(
    count: int,
    trace: str | None,
    scale_lengths: float,
    prompt_tokens: int,
    new_tokens: int,
    rate: float | None,
    arrivals: str | None,
    shared_prefix: int,
    model: str | None,
    bench_seed: int,
    no_ceilings: bool,
    **options: Any,
) -> None:
    """Time many requests: all at once, at a rate, or as a recorded trace has them.

    Prompts are random ordinary tokens, so that nothing is found in the prefix cache but what --shared-prefix puts
    there; answers go on past the model's own end, so that lengths are exact.

    \b
    Examples:
      glm4 bench throughput -m /path/hf_dir --requests 64 --prompt-tokens 256 --new-tokens 64
      glm4 bench throughput -m DIR --trace AzureLLMInferenceTrace_conv.csv --requests 200 --scale-lengths 0.1
      glm4 bench throughput -m DIR --rate 2 --shared-prefix 512
    """
    _check_load(trace, scale_lengths, rate, arrivals)
    from glm4.bench.load import arriving_at_random, fit, random_jobs, random_prompts, read_trace

    jobs = read_trace(trace, count) if trace else random_jobs(count, prompt_tokens, new_tokens, bench_seed)
    if rate is not None:
        jobs = arriving_at_random(jobs, rate, bench_seed)
    elif arrivals is None:
        jobs = [replace(job, arrival=0.0) for job in jobs]
    ceilings = _measure(model, options) if model and not no_ceilings else None
    llm = load(model, options)
    from glm4.bench.run import drive, report

    jobs, clipped = fit(jobs, scale_lengths, llm.max_model_len)
    warm_up, prompts = (
        random_prompts(some, llm.tokenizer, seed, shared_prefix * (some is jobs))
        for some, seed in ((jobs[:_WARM_UP], bench_seed + 1), (jobs, bench_seed))
    )
    drive(llm.engine, [replace(job, arrival=0.0) for job in jobs[:_WARM_UP]], warm_up)
    cache = llm.engine.scheduler.stats
    queried, hits = cache.queried_tokens, cache.hit_tokens
    with _progress() as progress:
        task = progress.add_task("throughput", total=len(jobs))
        run = drive(llm.engine, jobs, prompts, lambda: progress.update(task, advance=1))
    found = {
        "benchmark": "throughput",
        **_conditions(llm),
        "trace": trace,
        "scale_lengths": scale_lengths,
        "rate": rate,
        "arrivals": arrivals or ("poisson" if rate is not None else "at once"),
        "clipped_requests": clipped,
        **report(run),
        "prefix_cache": {"queried_tokens": cache.queried_tokens - queried, "hit_tokens": cache.hit_tokens - hits},
    }
    _show(llm, run, found, ceilings)


def _check_load(trace: str | None, scale_lengths: float, rate: float | None, arrivals: str | None) -> None:
    if not 0 < scale_lengths < float("inf"):
        raise OptionError(f"--scale-lengths {scale_lengths:g}: give a number above 0")
    if rate is not None and not 1e-6 <= rate < float("inf"):
        raise OptionError(f"--rate {rate:g}: give a number of requests a second above 0")
    if arrivals and not trace:
        raise OptionError("--arrivals trace needs a --trace to take the times from")
    if arrivals and rate is not None:
        raise OptionError("--arrivals trace and --rate both say when requests come: leave one of them out")


def _measure(model: str, options: dict[str, Any]) -> Ceilings:
    said = {name: value for name, value in options.items() if value is not None}
    from glm4.bench.ceilings import measure_ceilings

    return measure_ceilings(options_from(EngineOptions, {"model": model, **said}))


def _conditions(llm: LLM) -> Json:
    import torch

    from glm4.ops.cpu.library import kernels_summary

    device = None if llm.model is None else llm.model.device
    return {
        "model": llm.options.model,
        "device": "mindspore" if device is None else str(device),
        "dtype": llm.plan.dtype,
        "weights": llm.plan.weight_format,
        "threads": torch.get_num_threads(),
        "kernels": kernels_summary() if device is not None and device.type == "cpu" else None,
        "max_batch_tokens": llm.options.max_batch_tokens,
        "max_batch_requests": llm.options.max_batch_requests,
    }


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _show(llm: LLM, run: Run, found: Json, ceilings: Ceilings | None) -> None:
    from glm4.bench.ceilings import Work
    from glm4.bench.run import shares

    if ceilings is not None:
        import torch

        found["ceilings"] = shares(run, Work.of(llm.config, getattr(torch, llm.plan.dtype), llm.plan.layouts), ceilings)
    _print_tables(found)
    click.echo(json.dumps(found, ensure_ascii=False))


def _print_tables(found: Json) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    times = Table(title=f"{found['model']}, {found['weights']} on {found['device']}", title_justify="left")
    times.add_column("milliseconds")
    columns = ("mean", "p50", "p90", "p99", "max")
    for column in columns:
        times.add_column(column, justify="right")
    for name, key in (
        ("to the first token", "ttft_s"),
        ("token to token", "inter_token_s"),
        ("in all", "end_to_end_s"),
    ):
        if found[key] is not None:
            times.add_row(name, *(f"{found[key][column] * 1e3:,.1f}" for column in columns))
    console.print(times)
    rates = Table(show_header=False)
    for name, value in _rows(found):
        rates.add_row(name, value)
    console.print(rates)


def _rows(found: Json) -> list[tuple[str, str]]:
    rows = [
        ("requests", f"{found['requests']:,} in {found['seconds']:.1f} s, {found['requests_per_s']:.2f}/s"),
        ("prompt tokens", f"{found['prompt_tokens']:,}, {found['prompt_tokens_per_s']:,.1f}/s"),
        ("new tokens", f"{found['new_tokens']:,}, {found['new_tokens_per_s']:,.1f}/s"),
    ]
    if found["kernels"]:
        rows.insert(0, ("CPU kernels", found["kernels"]))
    phases = {phase: found[f"{phase}_tokens_per_s"] for phase in ("prefill", "decode")}
    rows += [(f"{phase} alone", f"{rate:,.1f} tokens/s") for phase, rate in phases.items() if rate is not None]
    if found.get("clipped_requests"):
        rows.append(("cut to the context", f"{found['clipped_requests']:,} requests"))
    if cache := found.get("prefix_cache"):
        rows.append(("prefix cache", f"{cache['hit_tokens']:,} of {cache['queried_tokens']:,} prompt tokens"))
    if ceilings := found.get("ceilings"):
        for name, share, used, best, unit in (
            ("memory, decode", "decode_share_of_memory", "decode_bytes_per_s", "memory_bytes_per_s", "GB/s"),
            ("arithmetic, prefill", "prefill_share_of_matmul", "prefill_flop_per_s", "matmul_flop_per_s", "GFLOP/s"),
        ):
            if ceilings[share] is not None:
                speeds = f"{ceilings[used] / 1e9:,.1f} of {ceilings[best] / 1e9:,.1f} {unit}"
                rows.append((name, f"{ceilings[share]:.1%} of the ceiling ({speeds})"))
    return rows
