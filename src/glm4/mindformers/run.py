"""The program behind `run_mindformer.py`: read the job, load the model, answer batch by batch, keep the result."""

from __future__ import annotations

import io
import logging
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4.engine.stats import EngineStats
from glm4.errors import INTERRUPTED, EngineError, Glm4Error, OptionError, OutputError, PromptError
from glm4.interrupts import interrupts_held
from glm4.mindformers.config import PredictJob, read_job
from glm4.mindformers.help import help_text
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
        job = read_job(argv, repository)
        check_writable(job.result_path)
        with _logging_to(job.output_dir):
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
    """Answer the prompts of `job` with the model that `load` gives; print and write the answers.

    Raises the Glm4Error of whatever failed.
    """
    for note in job.notes:
        log.info(note)
    started = time.perf_counter()
    log.info("loading %s", job.engine.model)
    llm = load(job.engine)
    log.info("ready after %.2f s", time.perf_counter() - started)
    answer = _answerer(llm, job)
    results, total = [], EngineStats()
    for number, prompts in enumerate(job.batches, 1):
        first = (number - 1) * job.batch_size + 1
        try:
            outputs = answer(prompts)
        except PromptError as error:
            raise PromptError(_which(first, len(prompts), len(job.prompts)) + str(error)) from error
        _refuse_failures(outputs, first, len(job.prompts))
        results.append([_answer(llm, job, output) for output in outputs])
        _print(answer_line(results[-1]))
        _warn_of_cut(outputs, first)
        write_results(job.result_path, results)  # after each batch, so that a later failure loses nothing
        total += llm.last_stats
    log.info("answered %d prompt%s", len(job.prompts), "" if len(job.prompts) == 1 else "s")
    for line in total.lines():
        log.info(line)
    command = "chat" if llm.has_chat_template else "generate '从前，'"
    print(f"\nresult: {job.result_path}", file=sys.stderr)
    print(f"next:   {_python()} -m glm4 {command} -m {shlex.quote(job.engine.model)}", file=sys.stderr)


def _answerer(llm: LLM, job: PredictJob) -> Callable[[list[str]], list[RequestOutput]]:
    """How one batch is answered: through the chat template, or as raw text."""
    if job.use_chat_template and not llm.has_chat_template:
        raise OptionError(f"use_chat_template True: {job.engine.model} has no chat template; pass False for raw text")
    if job.use_chat_template is False or not llm.has_chat_template:
        log.info("prompts are fed as raw text, without a chat template")
        return lambda prompts: llm.generate(prompts, job.sampling)
    return lambda prompts: llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], job.sampling)


def _answer(llm: LLM, job: PredictJob, output: RequestOutput) -> str:
    """The words meant for the reader; a GLM-Z1's thought goes to the log."""
    if job.use_chat_template is False or not llm.thinks:
        return output.text
    thought, answer = split_thought(output.text, inside=True)
    log.info("thought: %s", (thought or "").strip())
    return answer


def _which(first: int, count: int, total: int) -> str:
    """Which of `total` prompts an error is about."""
    if total == 1:
        return ""
    return f"prompt {first}: " if count == 1 else f"one of prompts {first} to {first + count - 1}: "


def _refuse_failures(outputs: Sequence[RequestOutput], first: int, total: int) -> None:
    """A result file holds whole answers: raise EngineError for one that failed."""
    for number, output in enumerate(outputs, first):
        if output.error is not None:
            raise EngineError(_which(number, 1, total) + output.error)


def _warn_of_cut(outputs: Sequence[RequestOutput], first: int) -> None:
    for number, output in enumerate(outputs, first):
        if output.finish_reason == "length":
            log.warning(
                "answer %d is cut off after %d tokens: raise max_new_tokens or max_length",
                number,
                len(output.token_ids),
            )


@contextmanager
def _logging_to(output_dir: Path) -> Iterator[None]:
    """Log lines go to standard error and to a file below `output_dir` for as long as the job runs."""
    path = output_dir / "log" / "rank_0" / "info.log"
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
