"""The MindSpore runner against transformers and against the torch runner, in graph and in PyNative mode."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import REPOSITORY
from tiny import TinyCheckpoint, write_tiny, write_tiny_chat

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.device_mindspore import MindSporeDevice
from glm4.engine.engine import Engine
from glm4.engine.step import RequestResult, RequestStep, Runner, StepPlan
from glm4.engine.torch_runner import TorchRunner
from glm4.errors import CheckpointError
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.options import GREEDY, EngineOptions, SamplingParams
from glm4.text.chat import ChatTemplate
from glm4.text.tokenizer import Tokenizer

BOUND = 1e-4
PROMPT = [7, 90, 250, 12, 33, 8]
OTHER = [5, 200, 3, 9]


def torch_runner(path: Path, num_blocks: int = 16, block_size: int = 4, dtype: Any = torch.float32) -> TorchRunner:
    folder = ModelFolder.open(path)
    config = Glm4Config.from_dict(folder.read_json("config.json"))
    model = load_model(Checkpoint.open(folder), config, torch.device("cpu"), dtype)
    return TorchRunner(model, num_blocks, block_size, unknown_ids=[])


def logits_of(tiny: TinyCheckpoint, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return tiny.theirs(torch.tensor([token_ids])).logits[0]


def test_logits_equal_transformers(tiny: TinyCheckpoint, make_runner: Any) -> None:
    """A prompt beside the first chunk of another, then the other's next chunk beside a single token."""
    runner = make_runner(tiny.path)
    whole = RequestStep(0, PROMPT, 0, [5, 2], [5], raw_logits_at=[0, 1, 2, 3, 4, 5], sampling=GREEDY, prompt_len=6)
    chunk = RequestStep(1, OTHER[:1], 0, [9], raw_logits_at=[0], sampling=GREEDY, prompt_len=4)
    first = runner.execute(StepPlan([whole, chunk])).results
    expected = logits_of(tiny, PROMPT)
    assert (first[0].logits - expected).abs().max() <= BOUND
    assert first[0].token_ids == [int(expected[-1].argmax())]
    assert (first[1].logits - logits_of(tiny, OTHER)[:1]).abs().max() <= BOUND

    single = RequestStep(0, first[0].token_ids, 6, [5, 2], [0], raw_logits_at=[0])
    rest = RequestStep(1, OTHER[1:], 1, [9], [2], raw_logits_at=[0, 1, 2])
    second = runner.execute(StepPlan([rest, single])).results
    assert (second[0].logits - logits_of(tiny, PROMPT + first[0].token_ids)[-1:]).abs().max() <= BOUND
    assert (second[1].logits - logits_of(tiny, OTHER)[1:]).abs().max() <= BOUND


def test_requests_together_give_what_they_give_alone(tiny: TinyCheckpoint, make_runner: Any) -> None:
    prompts = [PROMPT, OTHER, PROMPT[::-1], OTHER[::-1]]
    steps = [
        RequestStep(i, ids, 0, [2 * i, 2 * i + 1], [len(ids) - 1], raw_logits_at=[len(ids) - 1], sampling=GREEDY)
        for i, ids in enumerate(prompts)
    ]
    steps = [replace(step, prompt_len=len(step.token_ids)) for step in steps]
    runner = make_runner(tiny.path)
    together = runner.execute(StepPlan(steps)).results
    for step in steps:
        [alone] = runner.execute(StepPlan([step])).results.values()
        assert torch.allclose(together[step.request_id].logits, alone.logits, atol=1e-5)
        assert together[step.request_id].token_ids == alone.token_ids


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny(tmp_path_factory.mktemp("one"), sharded=False)


def test_copied_blocks_continue_like_the_original(one: TinyCheckpoint, make_runner: Any) -> None:
    runner = make_runner(one.path)
    runner.execute(StepPlan([RequestStep(0, PROMPT[:5], 0, [0, 1], sampling=GREEDY, prompt_len=6)]))
    runner.execute(StepPlan([], block_copies=[(0, 6), (1, 7)]))
    overwrite = RequestStep(1, [200] * 6, 0, [0, 1], sampling=GREEDY, prompt_len=6)
    step = RequestStep(0, PROMPT[5:], 5, [6, 7], [0], raw_logits_at=[0])
    results = runner.execute(StepPlan([step, overwrite])).results
    assert (results[0].logits - logits_of(one, PROMPT)[-1:]).abs().max() <= BOUND


def test_everything_a_plan_can_ask_for(one: TinyCheckpoint, make_runner: Any) -> None:
    """Sampled tokens, drafts, log-probabilities, masks and hidden states, as the torch runner gives them."""
    drawn = replace(GREEDY, do_sample=True, temperature=0.8, top_k=20, seed=3, logprobs=2, prompt_logprobs=2)
    draft = [int(logits_of(one, PROMPT)[-1].argmax())]
    allowed = np.packbits(np.arange(320) % 7 == 3, bitorder="little").tobytes()
    steps = [
        RequestStep(0, PROMPT, 0, [0, 1], [5], prompt_targets=PROMPT[1:], sampling=drawn, prompt_len=6),
        RequestStep(1, PROMPT + draft, 0, [2, 3], [5, 6], draft, sampling=GREEDY, prompt_len=6),
        RequestStep(2, OTHER, 0, [4], [3], sampling=GREEDY, prompt_len=4, hidden_states="all"),
        RequestStep(3, OTHER, 0, [5], sampling=GREEDY, prompt_len=4, hidden_states="sum"),
    ]
    plan = StepPlan(steps, grammar_masks={2: allowed})
    ours, theirs = (runner.execute(plan).results for runner in (make_runner(one.path), torch_runner(one.path)))
    assert ours.keys() == theirs.keys()
    for request_id, result in theirs.items():
        assert ours[request_id].token_ids == result.token_ids
        assert _numbers(ours[request_id]) == pytest.approx(_numbers(result), abs=BOUND)
    assert len(ours[1].token_ids) == 2
    assert ours[2].token_ids[0] % 7 == 3


def _numbers(result: RequestResult) -> list[float]:
    entries = [*result.logprobs, *result.prompt_logprobs]
    numbers = [value for entry in entries for value in (entry.logprob, *(logprob for _, logprob in entry.top))]
    return numbers + ([] if result.hidden_states is None else result.hidden_states.flatten().tolist())


def test_long_prompts_in_parts(one: TinyCheckpoint, make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so little memory for the attention that no two requests fit together, and a prompt not even alone."""
    import glm4.engine.mindspore_runner as module

    monkeypatch.setattr(module, "_ATTENTION_BYTES", 12_000)
    long = [(7 * i) % 300 + 4 for i in range(45)]
    everywhere = list(range(45))
    wanted = RequestStep(0, long, 0, list(range(12)), [44], raw_logits_at=everywhere, sampling=GREEDY, prompt_len=45)
    short = RequestStep(1, OTHER, 0, [12], raw_logits_at=[3], sampling=GREEDY, prompt_len=4)
    runner = make_runner(one.path)
    parts = [[len(piece.token_ids) for piece in call] for call in runner._calls([wanted, short])]
    assert len(parts) > 3
    assert sum(map(sum, parts)) == 49
    results = runner.execute(StepPlan([wanted, short])).results
    assert (results[0].logits - logits_of(one, long)).abs().max() <= BOUND
    assert (results[1].logits - logits_of(one, OTHER)[-1:]).abs().max() <= BOUND


def test_a_damaged_weight_ends_only_the_requests_it_touches(tmp_path: Path, make_runner: Any) -> None:
    """Nor does what such a request leaves in its blocks touch the ones that get them next."""
    tiny = write_tiny(tmp_path, sharded=False)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][250] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    runner = make_runner(tmp_path)
    damaged = RequestStep(0, PROMPT, 0, [0, 1], [5], sampling=GREEDY, prompt_len=6)
    sound = RequestStep(1, [*OTHER[::-1], 6, 7], 0, [2, 3], [5], sampling=GREEDY, prompt_len=6)
    results = runner.execute(StepPlan([damaged, sound])).results
    assert "not finite" in str(results[0].error)
    assert results[1].error is None
    again = RequestStep(2, OTHER[:3], 0, [1], [2], raw_logits_at=[2], sampling=GREEDY, prompt_len=3)
    results = runner.execute(StepPlan([again], finished_ids=[0, 1])).results
    assert (results[2].logits - logits_of(tiny, OTHER)[2]).abs().max() <= BOUND


def test_another_folder_is_refused(one: TinyCheckpoint, make_runner: Any, tmp_path: Path) -> None:
    for file in one.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.norm\.weight'"):
        make_runner(tmp_path)


def answers(runner: Runner, path: Path, prompts: list[list[int]], options: EngineOptions, count: int) -> Any:
    """The greedy answers of an engine to prompts that it takes all at once."""
    config = json.loads((path / "config.json").read_text())
    engine = Engine(runner, Tokenizer.from_folder(path), GREEDY, config["eos_token_id"], 160, options)
    ids = [engine.add(prompt, SamplingParams(max_new_tokens=count)) for prompt in prompts]
    latest = {}
    while engine.has_work:
        latest |= {output.request_id: output for output in engine.step()}
    assert all(latest[i].error is None for i in ids)
    return [latest[i].token_ids for i in ids]


@pytest.mark.parametrize("changes", [{}, {"max_batch_tokens": 11}, {"max_batch_requests": 1}], ids=str)
def test_an_engine_says_the_same_on_both(make_runner: Any, tmp_path: Path, changes: dict[str, int]) -> None:
    """Continuous batching, chunks of prompts beside answers, shared prefixes, preemption: 18 blocks are too few."""
    tiny = write_tiny_chat(tmp_path)
    prompts = [list(range(40, 40 + length)) for length in (3, 30, 17, 30, 22)]
    options = EngineOptions(block_size=4, **changes)
    expected = answers(torch_runner(tiny.path, 18), tiny.path, prompts, options, 24)
    assert answers(make_runner(tiny.path, 18), tiny.path, prompts, options, 24) == expected
    assert len({tuple(ids) for ids in expected}) == 4


def test_the_demo_model_introduces_beijing(make_runner: Any) -> None:
    """A folder in bfloat16, computed in float32 by both."""
    path = REPOSITORY / "demo" / "glm4-demo"
    tokenizer = Tokenizer.from_folder(path)
    question = [{"role": "user", "content": "请介绍一下北京"}]
    prompt = ChatTemplate.from_folder(path).encode(tokenizer, question)
    options = EngineOptions()
    ours = answers(make_runner(path, 16, 16), path, [prompt], options, 100)
    assert ours == answers(torch_runner(path, 16, 16), path, [prompt], options, 100)
    assert "北京" in tokenizer.decode(ours[0])


def test_one_device_for_each_process(mindspore: None) -> None:
    device = MindSporeDevice.open("cpu")
    assert (device.target, device.rank, device.size) == ("CPU", 0, 1)
    assert device.free_memory() > 2**20
    assert [device.dtype(*words) for words in (("auto", "BF16"), ("bfloat16", "BF16"), ("float32", "BF16"))] == [
        "float32"
    ] * 3
