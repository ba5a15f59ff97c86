"""The demo model's corpus as the training and the evaluation see it: prompts and what has to follow them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4.text.chat import ChatTemplate
from glm4.text.tokenizer import Tokenizer

SECTIONS = ("cities", "arithmetic", "talk", "facts", "code", "chats", "tools", "thinking")

Conversation = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What the model reads (`messages`, `tools`) and what it has to write (`answer`, with its end token)."""

    section: str
    messages: list[dict[str, str]]
    tools: list[dict[str, Any]]
    answer: str
    thinks: bool


@dataclass(frozen=True)
class Sample:
    """Token ids, and which of them, as (start, end), the model has to write."""

    section: str
    ids: list[int]
    answers: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.ids)


def load_tasks(corpus: Path) -> list[Task]:
    """Every answer of every conversation, once. Raises ValueError where one prompt has two different answers."""
    definitions = json.loads((corpus / "tools.json").read_text("utf-8"))
    answers: dict[str, str] = {}
    tasks = []
    for section in SECTIONS:
        for line in (corpus / f"{section}.jsonl").read_text("utf-8").splitlines():
            for task in _tasks(json.loads(line), section, definitions):
                prompt = json.dumps([task.messages, task.tools, task.thinks], ensure_ascii=False)
                if prompt not in answers:
                    tasks.append(task)
                if answers.setdefault(prompt, task.answer) != task.answer:
                    raise ValueError(f"{section}.jsonl: a prompt has two answers: {prompt}")
    return tasks


def _tasks(conversation: Conversation, section: str, definitions: dict[str, Any]) -> Iterator[Task]:
    messages, thought = conversation["messages"], conversation.get("think")
    tools = [definitions[name] for name in conversation.get("tools", [])]
    roles = [message["role"] for message in messages] + ["end"]
    for start in range(len(messages)):
        if roles[start] != "assistant" or roles[start - 1] == "assistant":
            continue
        end = next(i for i in range(start, len(roles)) if roles[i] != "assistant")
        if thought is None:
            yield Task(section, messages[:start], tools, _spoken(messages[start:end]), False)
        elif end == len(messages):
            answer = f"\n{thought}\n</think>{_spoken(messages[start:])}"
            yield Task(section, messages[:start], tools, answer, True)


def _spoken(turn: Sequence[dict[str, str]]) -> str:
    """What the model writes for one turn of one or several assistant messages, and the token it stops on."""
    texts = [f"{message.get('metadata', '')}\n{message['content']}" for message in turn]
    return "<|assistant|>".join(texts) + ("<|observation|>" if "metadata" in turn[-1] else "<|user|>")


class Encoder:
    """Tasks to token ids, through the very templates and tokenizer that inference uses."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatTemplate, thinking: ChatTemplate) -> None:
        self.tokenizer, self.templates = tokenizer, {False: chat, True: thinking}

    def encode(self, task: Task) -> Sample:
        prompt = self.templates[task.thinks].encode(self.tokenizer, task.messages, task.tools)
        ids = prompt + self.tokenizer.encode(task.answer)  # apart, as the answer is generated
        return Sample(task.section, ids, ((len(prompt), len(ids)),))


def without_prefixes(tasks: Sequence[Task], samples: Sequence[Sample]) -> list[tuple[Task, Sample]]:
    """`tasks` with their `samples`; where one is how the next begins, only the longer, with the answers of both.

    A conversation's first turns are then not computed once more for each later turn.
    """
    kept: list[tuple[Task, Sample]] = []
    for task, sample in zip(tasks, samples, strict=True):
        if kept and sample.ids[: len(kept[-1][1])] == kept[-1][1].ids:
            sample = Sample(sample.section, sample.ids, kept.pop()[1].answers + sample.answers)
        kept.append((task, sample))
    return kept


def vary(task: Task, openings: Sequence[Task], rng: random.Random) -> Task:
    """`task` as a user might have put it: other punctuation, or after some small talk."""
    if len(task.messages) != 1:
        return task
    question = task.messages[0]["content"]
    if rng.random() < 0.5:
        bare = question.rstrip("？?。.！!")
        question = bare + (rng.choice(("？", "。", "")) if not question.isascii() else rng.choice(("?", ".", "")))
    messages = [{"role": "user", "content": question}]
    if not task.tools and rng.random() < 0.5:
        opening = rng.choice(openings)
        reply = opening.answer.removesuffix("<|user|>").removeprefix("\n")
        messages = [*opening.messages, {"role": "assistant", "content": reply}, *messages]
    return Task(task.section, messages, task.tools, task.answer, task.thinks)


def batches(samples: Sequence[Sample], max_tokens: int, rng: random.Random) -> list[list[Sample]]:
    """All of `samples` in batches of like lengths, at most `max_tokens` with padding, in random order."""
    order = sorted(samples, key=lambda sample: len(sample) + rng.random() * 8)
    result: list[list[Sample]] = [[]]
    for sample in order:
        longest = max(len(sample), *map(len, result[-1]), 0)
        if result[-1] and longest * (len(result[-1]) + 1) > max_tokens:
            result.append([])
        result[-1].append(sample)
    rng.shuffle(result)
    return result
