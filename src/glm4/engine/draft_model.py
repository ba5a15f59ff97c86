"""A smaller model that guesses what the larger one will say, for `speculative.Speculator`.

It is a second runner that is driven by plans, as the scheduler drives the first, with a KV memory of its own. So it
picks a draft as the larger model picks a token, penalties and random number included: where both models agree on the
distribution, they agree on the token that is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import fmean

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.engine.kv_cache import BlockPool
from glm4.engine.request import Request
from glm4.engine.step import RequestStep, Runner, StepPlan
from glm4.errors import OptionError
from glm4.model.configuration_glm4 import Glm4Config
from glm4.text.tokenizer import Tokenizer


def open_draft(path: str, target: ModelFolder, tokenizer: Tokenizer) -> tuple[Checkpoint, Glm4Config]:
    """The weights of a draft model, not loaded yet, and its configuration.

    Raises OptionError, naming both folders, unless every token has the same id as in `target`, whose `tokenizer` this
    is, and what opening a folder raises.
    """
    folder = ModelFolder.open(path)
    config = Glm4Config.from_dict(folder.read_json("config.json"), str(folder.path / "config.json"))
    if not tokenizer.same_ids(Tokenizer.from_folder(folder.path)) or config.vocab_size < tokenizer.vocab_size:
        raise OptionError(
            f"speculative_model: {folder.path} has another vocabulary than {target.path}: name a smaller model of the "
            "same family, or leave it out"
        )
    return Checkpoint.open(folder), config


@dataclass(slots=True)
class _Sequence:
    """What the draft model has read of one request."""

    block_ids: list[int] = field(default_factory=list)
    num_read: int = 0
    """Tokens of the request whose keys and values are in the cache, and …"""
    guessed: list[int] = field(default_factory=list)
    """… its own guesses that are there after them."""
    num_published: int = 0
    identity: int = 0
    """As a `Request` has them."""
    known_to_runner: bool = False

    def drop_rejected(self, token_ids: list[int]) -> None:
        """Count as read what turned out right of the guesses; the last token is read again for what follows it."""
        for guess in self.guessed:
            if self.num_read >= len(token_ids) - 1 or token_ids[self.num_read] != guess:
                break
            self.num_read += 1
        self.num_read = min(self.num_read, len(token_ids) - 1)
        self.guessed = []


class DraftModel:
    """Proposes what a smaller model of the same vocabulary would say."""

    def __init__(self, runner: Runner, max_batch_tokens: int, max_context: int) -> None:
        """It reads at most `max_batch_tokens` new tokens a step, and no text beyond `max_context` tokens."""
        self.runner = runner
        self.pool = BlockPool(runner.num_blocks, runner.block_size)
        self.max_batch_tokens, self.max_context = max_batch_tokens, max_context
        self._sequences: dict[int, _Sequence] = {}
        self._ended_ids: list[int] = []

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """See `Drafter.propose`: one batch for each position, the first of which catches up on what is new.

        A request that has more to catch up on than fits in this step, or finds no free block, gets no drafts.
        """
        longest = ceil(fmean(count for _, count in wanted))  # a position costs the same for one request as for all
        asked = {request.request_id: (request, min(count, longest)) for request, count in wanted}
        drafts: dict[int, list[int]] = {request_id: [] for request_id in asked}
        steps = self._catch_up(asked)
        while steps:
            results = self.runner.execute(StepPlan(steps, finished_ids=self._take_ended())).results
            for request_id, result in results.items():
                drafts[request_id] += result.token_ids
            steps = [
                self._next(request_id, drafts[request_id])
                for request_id, result in results.items()
                if result.token_ids and len(drafts[request_id]) < asked[request_id][1]
            ]
        return list(drafts.values())

    def _take_ended(self) -> list[int]:
        ended, self._ended_ids = self._ended_ids, []
        return ended

    def _catch_up(self, asked: dict[int, tuple[Request, int]]) -> list[RequestStep]:
        """Read what is new, for as many as fit; those that have read everything get their first draft."""
        budget = self.max_batch_tokens
        steps = []
        for request, count in asked.values():
            tokens = request.token_ids
            if budget == 0 or len(tokens) + count > self.max_context:
                continue
            sequence = self._sequence(request)
            start = sequence.num_read
            end = min(len(tokens), start + budget)
            if not self._make_room(sequence, end + count - 1, asked):
                continue
            budget -= end - start
            steps.append(self._read(request, sequence, end))
        return steps

    def _sequence(self, request: Request) -> _Sequence:
        """What is read of `request`; at first, what another one that begins alike has left in the cache."""
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            prefix = self.pool.find_prefix(request.token_ids)
            self.pool.share(prefix.blocks)
            num_blocks = len(prefix.blocks)
            sequence = _Sequence(
                list(prefix.blocks),
                num_blocks * self.pool.block_size,
                num_published=num_blocks,
                identity=prefix.identity,
            )
            self._sequences[request.request_id] = sequence
        sequence.drop_rejected(request.token_ids)
        self.pool.publish_full(sequence, request.token_ids, sequence.num_read)
        return sequence

    def _make_room(self, sequence: _Sequence, length: int, asked: Iterable[int]) -> bool:
        """Blocks for `length` tokens; requests that rest give up theirs for it. False where that is not enough."""
        missing = max(0, self.pool.blocks_for(length) - len(sequence.block_ids))
        if missing > self.pool.num_free:
            self.forget(self._sequences.keys() - asked)
        if missing > self.pool.num_free:
            return False
        sequence.block_ids += self.pool.take(missing)
        return True

    def _read(self, request: Request, sequence: _Sequence, end: int) -> RequestStep:
        start, tokens = sequence.num_read, request.token_ids
        first_time, sequence.known_to_runner = not sequence.known_to_runner, True
        sequence.num_read = end
        return RequestStep(
            request_id=request.request_id,
            token_ids=tokens[start:end],
            start=start,
            block_ids=list(sequence.block_ids),
            logits_at=[end - start - 1] if end == len(tokens) else [],
            sampling=replace(request.sampling, logprobs=None, prompt_logprobs=None) if first_time else None,
            earlier_token_ids=tokens[:start] if first_time else [],
            prompt_len=request.prompt_len if first_time else 0,
        )

    def _next(self, request_id: int, drafts: list[int]) -> RequestStep:
        """Read the latest draft for the one after it."""
        sequence = self._sequences[request_id]
        start = sequence.num_read + len(sequence.guessed)
        sequence.guessed.append(drafts[-1])
        return RequestStep(request_id, drafts[-1:], start, list(sequence.block_ids), logits_at=[0])

    def forget(self, request_ids: Iterable[int]) -> None:
        """Free the blocks of requests that ended or lost their place."""
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                self.pool.give_back(sequence.block_ids)
                self._ended_ids.append(request_id)
