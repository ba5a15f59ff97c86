"""The program behind `run_mindformer.py`: read the job, load the model, answer batch by batch, keep the result."""

from __future__ import annotations

import io
import logging
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4.device_mindspore import adopt_msrun
from glm4.engine.stats import EngineStats
from glm4.errors import INTERRUPTED, EngineError, Glm4Error, OptionError, OutputError, PromptError
from glm4.interrupts import interrupts_held
from glm4.mindformers.config import PredictJob, read_job
from glm4.mindformers.help import help_text
from glm4.mindformers.replicas import Answer, exchange
from glm4.mindformers.result import answer_line, check_writable, write_results
from glm4.options import EngineOptions
from glm4.text.reasoning import split_thought

if TYPE_CHECKING:
    from glm4.engine.llm import LLM
    from glm4.engine.request import RequestOutput

log = logging.getLogger("glm4")


def load_llm(options: EngineOptions) -> LLM:
    """The model; the tensor library is imported here, once the job is known to be sound."""
    with interrupts_held():
        from glm4.engine.llm import LLM

    return LLM(options)


def main(argv: Sequence[str], repository: Path | None = None, load: Callable[[EngineOptions], Any] = load_llm) -> int:
    """Run the command line `argv` (without the program's name); the exit code.

    Errors that are the caller's to mend are one line on standard error; `--debug` shows their traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Chinese shows escapes
    try:
        if list(argv[:1]) == ["-h"] or "--help" in argv:
            _print(help_text())
            return 0
        adopt_msrun()
        job = read_job(argv, repository)
        if job.place.rank == 0:
            check_writable(job.result_path)
        with _logging_to(job.output_dir / "log" / f"rank_{job.place.rank}" / "info.log"):
            run(job, load)
    except Glm4Error as error:
        if "--debug" in argv:
            traceback.print_exc()
        print("error:", " ".join(str(error).split("\n")), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nerror: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def run(job: PredictJob, load: Callable[[EngineOptions], Any]) -> None:
    """Answer the prompts of `job` with the model that `load` gives; the first rank prints and writes the answers.

    Every replica of the model answers its share of each batch. A rank that leads none leaves inside `load`.
    Raises the Glm4Error of whatever failed.
    """
    for note in job.notes:
        log.info(note)
    started = time.perf_counter()
    log.info("loading %s", job.engine.model)
    with closing(load(job.engine)) as llm:
        log.info("ready after %.2f s", time.perf_counter() - started)
        total = _answer_all(llm, job)
        has_chat_template = llm.has_chat_template
    own = sum(len(job.share(prompts)) for prompts in job.batches)
    log.info("answered %d prompt%s", own, "" if own == 1 else "s")
    for line in total.lines():
        log.info(line)
    if job.place.rank == 0:
        command = "chat" if has_chat_template else "generate '从前，'"
        print(f"\nresult: {job.result_path}", file=sys.stderr)
        print(f"next:   {_python()} -m glm4 {command} -m {shlex.quote(job.engine.model)}", file=sys.stderr)


def _answer_all(llm: LLM, job: PredictJob) -> EngineStats:
    """Batch by batch; how long this rank took."""
    answer, place = _answerer(llm, job), job.place
    results, total = [], EngineStats()
    for number, prompts in enumerate(job.batches):
        first = number * job.batch_size + 1
        share = job.share(prompts)
        try:
            outputs = answer(share) if share else []
        except PromptError as error:
            raise PromptError(_which(first, len(prompts), len(job.prompts)) + str(error)) from error
        if share:
            total += llm.last_stats
        answers = exchange(number, [_answer(llm, job, output) for output in outputs], place)
        if place.rank == 0:
            _refuse_failures(answers, first, len(job.prompts))
            results.append([answer.text for answer in answers])
            _print(answer_line(results[-1]))
            _warn_of_cut(answers, first)
            write_results(job.result_path, results)  # after each batch, so that a later failure loses nothing
    return total


def _answerer(llm: LLM, job: PredictJob) -> Callable[[list[str]], list[RequestOutput]]:
    """How one batch is answered: through the chat template, or as raw text."""
    if job.use_chat_template and not llm.has_chat_template:
        raise OptionError(f"use_chat_template True: {job.engine.model} has no chat template; pass False for raw text")
    if job.use_chat_template is False or not llm.has_chat_template:
        log.info("prompts are fed as raw text, without a chat template")
        return lambda prompts: llm.generate(prompts, job.sampling)
    return lambda prompts: llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], job.sampling)


def _answer(llm: LLM, job: PredictJob, output: RequestOutput) -> Answer:
    """The words meant for the reader; a GLM-Z1's thought goes to the log."""
    text = output.text
    if job.use_chat_template is not False and llm.thinks and output.error is None:
        thought, text = split_thought(output.text, inside=True)
        log.info("thought: %s", (thought or "").strip())
    return Answer(text, len(output.token_ids), output.finish_reason == "length", output.error)


def _which(first: int, count: int, total: int) -> str:
    """Which of `total` prompts an error is about."""
    if total == 1:
        return ""
    return f"prompt {first}: " if count == 1 else f"one of prompts {first} to {first + count - 1}: "


def _refuse_failures(answers: Sequence[Answer], first: int, total: int) -> None:
    """A result file holds whole answers: raise EngineError for one that failed."""
    for number, answer in enumerate(answers, first):
        if answer.error is not None:
            raise EngineError(_which(number, 1, total) + answer.error)


def _warn_of_cut(answers: Sequence[Answer], first: int) -> None:
    for number, answer in enumerate(answers, first):
        if answer.cut:
            log.warning(
                "answer %d is cut off after %d tokens: raise max_new_tokens or max_length", number, answer.tokens
            )


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Log lines go to standard error and to a file for as long as the job runs."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"output_dir: {path} cannot be written: {error.strerror}; pass --output_dir with a folder that can"
        ) from error
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr), to_file]
    level = log.level
    log.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s - glm4 - %(levelname)s - %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def _print(text: str) -> None:
    """To standard output, at once. Raises OutputError where nobody can read it."""
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = io.StringIO()  # or the interpreter complains again as it ends
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def _python() -> str:
    """This interpreter, as short as a shell here would find it."""
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd())) if executable.is_relative_to(Path.cwd()) else str(executable)
