"""The whole engine on a tiny model, whatever arrives, leaves and fails: transformers' tokens, and no block lost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny_chat

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.engine import scheduler
from glm4.engine.engine import Engine
from glm4.engine.request import Request, RequestOutput
from glm4.engine.step import StepPlan, StepResult
from glm4.engine.torch_runner import TorchRunner
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.options import GREEDY, EngineOptions, SamplingParams
from glm4.text.tokenizer import Tokenizer

LONGEST = 24
MOST_BLOCKS = 70
BEGINNINGS = [[70, 71, 72, 73] * 5, [80, 81] * 10, list(range(40, 60))]
PROMPTS = [beginning[:length] for beginning in BEGINNINGS for length in (1, 2, 3, 5, 8, 13, 20)]
MARGIN = 1e-3
"""By which the best token beats the second, so that rounding decides nothing."""


class World:
    """A model of ours, and what transformers says about its prompts."""

    def __init__(self, folder: Path) -> None:
        self.theirs = write_tiny_chat(folder, num_hidden_layers=2, hidden_size=32, intermediate_size=48).theirs
        opened = ModelFolder.open(folder)
        self.config = Glm4Config.from_dict(opened.read_json("config.json"))
        self.tokenizer = Tokenizer.from_folder(folder)
        self.unknown_ids = self.tokenizer.unknown_ids(self.config.vocab_size)
        checkpoint, device = Checkpoint.open(opened), torch.device("cpu")
        self.model = load_model(checkpoint, self.config, device, torch.float32, lambda name: None)
        self.runner = cache(lambda block_size: TorchRunner(self.model, MOST_BLOCKS, block_size, self.unknown_ids))
        self.expected = cache(self._expected)

    def _expected(self, number: int) -> list[int]:
        """The greedy answer, as far as it is clear-cut."""
        tokens = list(PROMPTS[number])
        with torch.no_grad():
            while len(tokens) < len(PROMPTS[number]) + LONGEST:
                logits = self.theirs(torch.tensor([tokens])).logits[0, -1]
                logits[self.unknown_ids] = -torch.inf
                (best, second), (token_id, _) = (part.tolist() for part in logits.topk(2))
                if best - second < MARGIN:
                    break
                tokens.append(token_id)
                if token_id in self.config.eos_token_ids:
                    break
        return tokens[len(PROMPTS[number]) :]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


KINDS = {
    "greedy": SamplingParams(max_new_tokens=LONGEST),
    "short": SamplingParams(max_new_tokens=3),
    "sampled": SamplingParams(max_new_tokens=9, temperature=1.2, seed=5),
    "held": SamplingParams(max_new_tokens=12, regex="[a-c]{2,20}x?", temperature=1.0),
    "twins": SamplingParams(max_new_tokens=8),
    "beams": SamplingParams(max_new_tokens=6, num_beams=2),
}
arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # the step at which it comes
        st.integers(0, len(PROMPTS) - 1),
        st.sampled_from(sorted(KINDS)),
        st.integers(0, 2),  # priority
        st.one_of(st.none(), st.none(), st.integers(1, 10)),  # steps until its caller goes away
    ),
    min_size=1,
    max_size=6,
)


def live_requests(engine: Engine) -> list[Request]:
    return [*engine.scheduler.running, *engine.scheduler.waiting]


def check_blocks(engine: Engine) -> None:
    """Every block is free, or held as often as tables name it; one that will be written has one holder."""
    pool = engine.scheduler.pool
    tables = Counter(block for request in live_requests(engine) for block in request.block_ids)
    assert pool.num_free + len(tables) == pool.num_blocks
    assert [pool._holders[block] for block in range(pool.num_blocks)] == [tables[b] for b in range(pool.num_blocks)]
    assert set(pool._free) == set(range(pool.num_blocks)) - set(tables)
    for request in live_requests(engine):
        assert len(set(request.block_ids)) == len(request.block_ids)
        for block in request.block_ids[request.num_computed // pool.block_size :]:
            assert tables[block] == 1, "a block that will be written is shared"


@mock.patch.object(scheduler, "_LEAST_SHARE", 1)
@settings(max_examples=500)
@given(
    arrivals=arrivals,
    block_size=st.sampled_from([1, 2, 5, 16]),
    spare_blocks=st.integers(0, 12),
    max_tokens=st.integers(1, 40),
    max_requests=st.integers(2, 6),
    prefix_caching=st.booleans(),
    drafts=st.sampled_from([0, 0, 3]),
    fails_at=st.one_of(st.none(), st.none(), st.integers(1, 15)),
    stages=st.sampled_from([1, 2, 3]),
)
def test_the_same_tokens_as_alone_and_no_block_lost(
    world: World,
    arrivals: list[tuple[int, int, str, int, int | None]],
    block_size: int,
    spare_blocks: int,
    max_tokens: int,
    max_requests: int,
    prefix_caching: bool,
    drafts: int,
    fails_at: int | None,
    stages: int,
) -> None:
    options = EngineOptions(
        max_batch_tokens=max_tokens,
        max_batch_requests=max_requests,
        prefix_caching=prefix_caching,
        speculative_tokens=drafts,
        seed=1,
    )
    runner = _Runner(world.runner(block_size), 2 * -(-27 // block_size) + spare_blocks, fails_at)
    if stages > 1:
        runner = _StagedRunner(runner, stages)
    engine = Engine(runner, world.tokenizer, GREEDY, world.config.eos_token_ids, 46, options)
    if engine.speculator is not None:
        engine.speculator.clock = lambda: 0.0  # drafts cost nothing, so none is held back
    ids: dict[int, int] = {}
    twins: dict[int, int] = {}
    last: dict[int, RequestOutput] = {}
    failed: set[int] = set()
    for step in range(3000):
        for number, (arrives, prompt, kind, priority, patience) in enumerate(arrivals):
            if arrives == step:
                ids[number] = engine.add(PROMPTS[prompt], KINDS[kind], priority=priority)
                if kind == "twins":
                    twins[number] = engine.add(
                        PROMPTS[prompt], KINDS[kind], priority=priority, choice=1, after=ids[number]
                    )
            if patience is not None and arrives + patience == step:
                engine.abort(ids[number])
        if engine.has_work:
            outputs = engine.step()
            last |= {output.request_id: output for output in outputs}
            failed |= {output.request_id for output in outputs if output.error is not None}
        elif len(ids) == len(arrivals) and all(a + (p or 0) <= step for a, _, _, _, p in arrivals):
            break
        check_blocks(engine)
        assert sum(not request.is_beam for request in engine.scheduler.running) <= max_requests
    assert not live_requests(engine), "a request starved"
    assert not engine._answers and not engine._searches and not engine.constraints._open
    assert not engine.scheduler._underway
    if isinstance(runner, _StagedRunner):
        assert not runner.underway and not runner.broken
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert not failed or runner.has_failed
    for number, (_, prompt, kind, _, patience) in enumerate(arrivals):
        output = last.get(ids[number])
        if output is None:
            assert patience is not None
            continue
        if patience is None:
            assert output.finish_reason in ("stop", "length") or ids[number] in failed
        _check_answer(world, prompt, kind, output)
    for number, twin_id in twins.items():
        if twin_id in last:
            _check_answer(world, arrivals[number][1], "twins", last[twin_id])


class _Runner:
    """The real one with fewer blocks, on which one step may fail."""

    def __init__(self, runner: TorchRunner, num_blocks: int, fails_at: int | None) -> None:
        self._runner, self.num_blocks, self._fails_at = runner, min(num_blocks, MOST_BLOCKS), fails_at
        self.block_size, self.vocab_size = runner.block_size, runner.vocab_size
        self.steps = 0
        runner._picker._states.clear()

    @property
    def has_failed(self) -> bool:
        return self._fails_at is not None and self.steps >= self._fails_at

    def execute(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        if self.steps == self._fails_at:
            raise RuntimeError("the card fell out")
        return self._runner.execute(plan)


class _StagedRunner(_Runner):
    """Has several steps under way, and computes them when they are asked for: the later, the sooner a wrong order or a
    block given to two shows."""

    def __init__(self, runner: _Runner, stages: int) -> None:
        vars(self).update(vars(runner))
        self.stages, self.underway = stages, list[StepPlan]()
        self.broken = False

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        self.underway.append(plan)
        self.broken |= len(self.underway) > self.stages
        requests = [step.request_id for each in self.underway for step in each.requests]
        self.broken |= len(requests) > len(set(requests))
        return lambda: self.finish(plan)

    def finish(self, plan: StepPlan) -> StepResult:
        self.broken |= self.underway.pop(0) is not plan
        return self.execute(plan)


def _check_answer(world: World, prompt: int, kind: str, output: RequestOutput) -> None:
    if kind in ("greedy", "short", "twins"):
        expected = world.expected(prompt)
        clear = min(len(expected), len(output.token_ids))
        assert output.token_ids[:clear] == expected[:clear]
    elif kind == "held":
        assert re.fullmatch("[a-c]*x?", output.text)
        if output.finish_reason == "stop":
            assert re.fullmatch("[a-c]{2,20}x?", output.text)
    elif output.finish_reason in ("stop", "length"):
        assert output.token_ids == _alone(world, prompt, kind).token_ids


_alone_found: dict[tuple[int, str], RequestOutput] = {}


def _alone(world: World, prompt: int, kind: str) -> RequestOutput:
    """The answer with all the room there is; what other tests compare with transformers."""
    if (prompt, kind) not in _alone_found:
        options = EngineOptions(seed=1)
        runner = _Runner(world.runner(16), MOST_BLOCKS, None)
        engine = Engine(runner, world.tokenizer, GREEDY, world.config.eos_token_ids, 46, options)
        engine.add(PROMPTS[prompt], KINDS[kind])
        while engine.has_work:
            for output in engine.step():
                _alone_found[prompt, kind] = output
    return _alone_found[prompt, kind]
