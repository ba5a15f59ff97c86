"""What a plan can ask of the torch runner beside tokens, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import TinyCheckpoint, write_tiny

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.engine.step import RequestStep, StepPlan
from glm4.engine.torch_runner import TorchRunner
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.options import GREEDY

PROMPT = [7, 90, 250, 12, 33, 8]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def runner_of(path: Path) -> TorchRunner:
    folder = ModelFolder.open(path)
    config = Glm4Config.from_dict(folder.read_json("config.json"))
    model = load_model(Checkpoint.open(folder), config, torch.device("cpu"), torch.float32)
    return TorchRunner(model, num_blocks=8, block_size=4, unknown_ids=[])


def test_hidden_states_are_those_before_the_head(tiny: TinyCheckpoint) -> None:
    """With and without a token to pick, and only where they are wanted."""
    runner = runner_of(tiny.path)
    wants = RequestStep(0, PROMPT, 0, [0, 1], hidden_states="all", sampling=GREEDY, prompt_len=6)
    other = RequestStep(1, PROMPT, 0, [2, 3], [5], sampling=GREEDY, prompt_len=6)
    results = runner.execute(StepPlan([wants, other])).results
    with torch.no_grad():
        expected = tiny.theirs.model(torch.tensor([PROMPT])).last_hidden_state[0]
    assert torch.allclose(results[0].hidden_states, expected, atol=1e-5)
    assert results[0].token_ids == []
    assert results[1].hidden_states is None
    assert len(results[1].token_ids) == 1


def test_copied_blocks_continue_like_the_original(tiny: TinyCheckpoint) -> None:
    """A request goes on in copies of its blocks; what is then written over the originals does not matter."""
    runner = runner_of(tiny.path)
    runner.execute(StepPlan([RequestStep(0, PROMPT[:5], 0, [0, 1], sampling=GREEDY, prompt_len=6)]))
    step = RequestStep(0, PROMPT[5:], 5, [6, 7], [0])
    runner.execute(StepPlan([], block_copies=[(0, 6), (1, 7)]))
    overwrite = RequestStep(1, [200] * 6, 0, [0, 1], sampling=GREEDY, prompt_len=6)
    results = runner.execute(StepPlan([step, overwrite])).results
    with torch.no_grad():
        expected = int(tiny.theirs(torch.tensor([PROMPT])).logits[0, -1].argmax())
    assert results[0].token_ids == [expected]
