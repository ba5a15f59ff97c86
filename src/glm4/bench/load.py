"""What a benchmark asks for: lengths and arrival times, from a trace or at random, and prompts of those lengths."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path

from glm4.errors import OptionError, PromptError
from glm4.text.tokenizer import Tokenizer

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a benchmark."""

    prompt_tokens: int
    new_tokens: int
    arrival: float = 0.0
    """Seconds after the beginning."""


def read_trace(path: str, count: int) -> list[Job]:
    """The first `count` requests of a CSV file in the format of the Azure LLM inference trace.

    Its columns are TIMESTAMP, ContextTokens and GeneratedTokens (github.com/Azure/AzurePublicDataset). Raises
    PromptError that names the line of what is not understood.
    """
    jobs: list[Job] = []
    first: datetime | None = None
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise PromptError(f"{path}:1: no column {missing[0]}; a trace has {', '.join(_COLUMNS)}")
            for row in islice(rows, count):
                when, prompt_tokens, new_tokens = _read_row(row, f"{path}:{rows.line_num}")
                first = first or when
                jobs.append(Job(prompt_tokens, new_tokens, max(0.0, (when - first).total_seconds())))
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise PromptError(f"{path} is no CSV file: {error}") from error
    if not jobs:
        raise PromptError(f"{path} holds no requests")
    return jobs


def _read_row(row: dict[str, str | None], where: str) -> tuple[datetime, int, int]:
    try:
        when, *lengths = (row[name] or "" for name in _COLUMNS)
        prompt_tokens, new_tokens = map(int, lengths)
        found = datetime.fromisoformat(when), prompt_tokens, new_tokens
    except ValueError as error:
        raise PromptError(f"{where}: {error}; a row is a time and two numbers of tokens") from error
    if min(prompt_tokens, new_tokens) < 0:
        raise PromptError(f"{where}: a number of tokens is below 0")
    return found


def random_jobs(count: int, prompt_tokens: int, new_tokens: int, seed: int) -> list[Job]:
    """`count` requests with lengths drawn evenly between a half and three halves of the given ones."""
    random_numbers = random.Random(seed)

    def around(length: int) -> int:
        return random_numbers.randint(max(1, length // 2), max(1, length + length // 2))

    return [Job(around(prompt_tokens), around(new_tokens)) for _ in range(count)]


def arriving_at_random(jobs: Sequence[Job], rate: float, seed: int) -> list[Job]:
    """`jobs` as a Poisson process of `rate` requests a second; the first comes at once."""
    random_numbers, now, arriving = random.Random(seed), 0.0, []
    for job in jobs:
        arriving.append(replace(job, arrival=now))
        now += random_numbers.expovariate(rate)
    return arriving


def fit(jobs: Sequence[Job], scale: float, longest: int) -> tuple[list[Job], int]:
    """`jobs` with their lengths times `scale`, at least 1 each, cut where prompt and answer pass `longest` tokens.

    Also how many were cut: of those the prompt is kept as far as it leaves room for one new token.
    """
    fitted, clipped = [], 0
    for job in jobs:
        prompt_tokens, new_tokens = (max(1, round(length * scale)) for length in (job.prompt_tokens, job.new_tokens))
        clipped += prompt_tokens + new_tokens > longest
        prompt_tokens = min(prompt_tokens, longest - 1)
        fitted.append(replace(job, prompt_tokens=prompt_tokens, new_tokens=min(new_tokens, longest - prompt_tokens)))
    return fitted, clipped


def random_prompts(jobs: Sequence[Job], tokenizer: Tokenizer, seed: int, shared_prefix: int = 0) -> list[list[int]]:
    """A prompt of random ordinary tokens for each job, so that no prefix is found in the cache by chance.

    The first `shared_prefix` tokens are the same in all. Raises OptionError for a tokenizer without ordinary tokens.
    """
    size = tokenizer.vocab_size
    apart = {*tokenizer.added_tokens.values(), *tokenizer.unknown_ids(size)}
    ordinary = [token_id for token_id in range(size) if token_id not in apart]
    if not ordinary:
        raise OptionError("the tokenizer has no ordinary tokens to make prompts of")
    random_numbers = random.Random(seed)
    prefix = random_numbers.choices(ordinary, k=shared_prefix)
    return [
        prefix[: job.prompt_tokens] + random_numbers.choices(ordinary, k=max(0, job.prompt_tokens - shared_prefix))
        for job in jobs
    ]
