"""`glm4 batch`: a file of requests in, a file of records out."""

from __future__ import annotations

import sys
import time
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glm4.batch.files import BatchInput, BatchOutput, settings_digest
from glm4.cli.common import engine_options, load, loading_bar, model_option, sampling_from, verbose_option
from glm4.cli.replica_options import ray_options, scale_from
from glm4.engine.progress import answer_progress
from glm4.errors import Glm4Error, OptionError, OutputError
from glm4.options import EngineOptions, SamplingParams, options_from

if TYPE_CHECKING:
    from array import array

    from glm4.batch.run import Batch
    from glm4.cluster.local_batch import LocalBatch
    from glm4.cluster.ray_batch import RayBatch

    AnyBatch = Batch | LocalBatch | RayBatch

_WORDS_DEPEND_ON = ("seed", "dtype", "kv_cache_dtype", "max_model_len")
"""Engine options that decide what is answered, beside how fast."""


@click.command("batch", short_help="answer a file of requests, resumable")
@click.argument("source", metavar="IN.jsonl")
@click.option("-o", "--output", required=True, metavar="OUT.jsonl", help="where the records go; - is standard output")
@model_option
@click.option(
    "--option", "sampling", nargs=2, multiple=True, metavar="KEY VALUE", help="how to answer requests that do not say"
)
@click.option("--raw", is_flag=True, help='continue a {"prompt": …} as it is, without the chat template')
@click.option("--restart", is_flag=True, help="begin again: forget the records in OUT.jsonl")
@ray_options
@verbose_option
@engine_options
def command(
    source: str,
    output: str,
    model: str | None,
    sampling: tuple[tuple[str, str], ...],
    raw: bool,
    restart: bool,
    ray: bool,
    min_replicas: int | None,
    max_replicas: int | None,
    **options: Any,
) -> None:
    """Answer every line of IN.jsonl (- is standard input) and append one record each to OUT.jsonl as it finishes.

    A line is {"prompt": "text"} or {"messages": […], "tools": […]}, with any sampling option beside it, or a line of
    OpenAI's batch format for /v1/chat/completions or /v1/completions. What a line does not say is as the model's
    folder says, also the temperature and the length.

    Killed or interrupted, the same command goes on where it was. A line that cannot be answered gets an error record.
    Leaves with 0 when every record is an answer and 1 when some are errors.

    \b
    Examples:
      glm4 batch questions.jsonl -o answers.jsonl -m /path/hf_dir
      glm4 batch questions.jsonl -o answers.jsonl -m DIR --option max_new_tokens 200 --seed 7
      cat questions.jsonl | glm4 batch - -o - -m DIR > answers.jsonl
      RAY_ADDRESS=10.0.0.1:6379 glm4 batch questions.jsonl -o answers.jsonl -m DIR --ray --max-replicas 16
    """
    params = sampling_from(sampling)
    requests = BatchInput(source)
    fingerprints = requests.fingerprints() if requests.rereadable else None
    settings = settings_digest(
        Path(model or "").resolve().name, raw, params, *(options[name] for name in _WORDS_DEPEND_ON)
    )
    records = BatchOutput(output)
    try:
        if requests.path is not None and records.is_same_file(requests.path):
            raise OptionError(f"{requests.title} is both the input and the output: give -o another file")
        if not restart:
            _resume(records, requests, fingerprints, settings)
        total = None if fingerprints is None else sum(1 for found in fingerprints if found)
        if total is not None and len(records.done) == total:
            click.echo(f"all {total} requests have their record in {records.title} already", err=True)
        else:
            batch = _loaded(model, options, (ray, min_replicas, max_replicas), settings, raw, params)
            if restart:
                records.clear()  # not before it is known that there is a model
            with closing(batch), redirect_stdout(sys.stderr):  # where Ray tells of its processes, not among records
                _answer(batch, requests, records, total)
    finally:
        records.close()
    raise click.exceptions.Exit(1 if records.num_errors else 0)


def _loaded(
    model: str | None,
    options: dict[str, Any],
    ray: tuple[bool, int | None, int | None],
    settings: str,
    raw: bool,
    params: SamplingParams,
) -> AnyBatch:
    """The model, or several copies of it, ready to answer."""
    said = {name: value for name, value in options.items() if value is not None}
    engine: EngineOptions = options_from(EngineOptions, {"model": model or "", **said})
    scale = scale_from(engine, *ray)
    if scale is not None and model:
        from glm4.cluster.ray_batch import RayBatch

        return RayBatch(engine, scale, settings, raw, params)
    if engine.data_parallel > 1 and model:
        from glm4.cluster.local_batch import LocalBatch

        with loading_bar() as on_load:
            return LocalBatch(engine, settings, raw, params, on_load)
    llm = load(model, options)
    from glm4.batch.run import Batch

    return Batch(llm, settings, raw, params)


def _resume(records: BatchOutput, requests: BatchInput, fingerprints: array[int] | None, settings: str) -> None:
    if fingerprints is not None and records.is_file:
        records.resume(requests, fingerprints, settings)
    elif not records.is_empty:
        raise OutputError(
            f"{records.title} is not empty, and requests that come through a pipe cannot be gone on with: choose "
            "another file, or use --restart to begin again"
        )


def _answer(batch: AnyBatch, requests: BatchInput, records: BatchOutput, total: int | None) -> None:
    earlier, started = len(records.done), time.perf_counter()
    if earlier:
        click.echo(f"going on: {earlier} of {total} requests have their record already", err=True)
    try:
        with answer_progress(lambda: batch.new_tokens) as progress:
            task = progress.add_task("batch", total=total, completed=earlier)
            for line, record in batch.run(requests.lines(), records.done):
                records.write(line, record)
                progress.update(task, advance=1)
    except (KeyboardInterrupt, Glm4Error):
        _say_how_to_go_on(records, total)
        raise
    click.echo(_summary(batch, records, earlier, time.perf_counter() - started), err=True)


def _say_how_to_go_on(records: BatchOutput, total: int | None) -> None:
    if total is not None and records.is_file:
        click.echo(
            f"\n{len(records.done)} of {total} requests have their record in {records.title}: "
            "run the same command again to go on",
            err=True,
        )


def _summary(batch: AnyBatch, records: BatchOutput, earlier: int, seconds: float) -> str:
    errors = records.num_errors
    return (
        f"{len(records.done)} requests{f' ({earlier} of them before)' if earlier else ''}, "
        f"{errors} {'error' if errors == 1 else 'errors'}; {batch.prompt_tokens} prompt tokens and "
        f"{batch.new_tokens} new ones in {seconds:.1f} s, {batch.new_tokens / seconds:.1f} tokens/s"
    )
