"""The plain model and the inference model against transformers.Glm4ForCausalLM, on checkpoints it wrote itself."""

from __future__ import annotations

import random
from itertools import count

import pytest
import torch
import transformers
from tiny import SHAPES, TinyCheckpoint, write_tiny
from torch import Tensor

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.engine.step import RequestStep, StepPlan
from glm4.engine.torch_runner import TorchRunner
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.model.modeling_glm4 import Glm4ForCausalLM
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.model.utils import tensor_specs
from glm4.ops import fused
from glm4.ops.attention import make_batch
from glm4.options import GREEDY
from glm4.quantization.weights import as_tensor

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny(tmp_path_factory.mktemp("tiny"), **SHAPES[request.param])


def open_tiny(tiny: TinyCheckpoint) -> tuple[Checkpoint, Glm4Config]:
    folder = ModelFolder.open(tiny.path)
    return Checkpoint.open(folder), Glm4Config.from_dict(folder.read_json("config.json"))


def plain_model(tiny: TinyCheckpoint) -> Glm4ForCausalLM:
    checkpoint, config = open_tiny(tiny)
    model = Glm4ForCausalLM(config)
    weights = {spec.name: as_tensor(checkpoint.read(spec.name)) for spec in tensor_specs(config)}
    model.load_state_dict(weights, strict=not config.tie_word_embeddings)
    return model.eval()


def paged_logits(model: Glm4ForInference, prompts: list[list[int]], chunks: list[list[int]], block_size: int) -> Tensor:
    """Logits of every token of every prompt, computed side by side in the given chunks, in scattered blocks."""
    blocks_each = -(-max(map(len, prompts)) // block_size)
    shuffled = list(range(blocks_each * len(prompts)))
    random.Random(0).shuffle(shuffled)
    tables = [shuffled[i :: len(prompts)] for i in range(len(prompts))]
    cache = model.new_kv_cache(len(shuffled) * block_size, model.embed_tokens.dtype)
    done = [0] * len(prompts)
    found: list[list[Tensor]] = [[] for _ in prompts]
    for step in count():
        todo = [i for i in range(len(prompts)) if step < len(chunks[i])]
        if not todo:
            break
        spans, ids, positions = [], [], []
        for i in todo:
            size = chunks[i][step]
            spans.append((len(ids), len(ids) + size))
            ids += prompts[i][done[i] : done[i] + size]
            positions += range(done[i], done[i] + size)
        batch = make_batch(spans, [done[i] for i in todo], [tables[i] for i in todo], block_size, CPU)
        logits = model.logits(model.forward(torch.tensor(ids), torch.tensor(positions), batch, cache))
        for i, (first, end) in zip(todo, spans, strict=True):
            found[i].append(logits[first:end])
            done[i] += end - first
    return torch.cat([torch.cat(parts) for parts in found])


@torch.inference_mode()
def test_plain_logits_equal(tiny: TinyCheckpoint) -> None:
    ids = torch.randint(4, 320, (2, 200), generator=torch.Generator().manual_seed(1))
    assert (plain_model(tiny)(ids) - tiny.theirs(ids).logits).abs().max() <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("kernels", ["native where built", "torch"])
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_paged_logits_equal_for_any_chunks(
    tiny: TinyCheckpoint, block_size: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "torch":
        monkeypatch.setattr(fused, "computes", lambda x: False)
    checkpoint, config = open_tiny(tiny)
    model = load_model(checkpoint, config, CPU, torch.float32)
    draw = random.Random(block_size)
    prompts = [[draw.randrange(4, 320) for _ in range(length)] for length in (1, 33, 128, 200)]
    chunks = []
    for prompt in prompts:
        sizes = []
        while sum(sizes) < len(prompt):
            sizes.append(min(draw.choice([1, 1, 5, 16, 60]), len(prompt) - sum(sizes)))
        chunks.append(sizes)
    ours = paged_logits(model, prompts, chunks, block_size)
    theirs = torch.cat([tiny.theirs(torch.tensor([prompt])).logits[0] for prompt in prompts])
    assert (ours - theirs).abs().max() <= 1e-5


@torch.inference_mode()
def test_greedy_tokens_equal(tiny: TinyCheckpoint) -> None:
    """64 tokens through the runner, ids that no tokenizer knows masked on both sides."""
    checkpoint, config = open_tiny(tiny)
    unknown = list(range(300, 320))
    runner = TorchRunner(load_model(checkpoint, config, CPU, torch.float32), 40, 4, unknown)
    prompt = [7, 90, 250, 12, 33]
    ours: list[int] = []
    table = list(range(40))[::-1]
    step = RequestStep(0, prompt, 0, table, [len(prompt) - 1], sampling=GREEDY, prompt_len=len(prompt))
    for _ in range(64):
        [token] = runner.execute(StepPlan([step])).results[0].token_ids
        ours.append(token)
        step = RequestStep(0, [token], len(prompt) + len(ours) - 1, table, [0])

    sequence = list(prompt)
    for position, token in enumerate(ours):
        logits = tiny.theirs(torch.tensor([sequence])).logits[0, -1]
        logits[unknown] = -torch.inf
        best, second = logits.topk(2).values
        if best - second < 1e-4:
            assert position > 0, "the reference cannot tell the first two apart at once: choose another prompt"
            break
        assert token == int(logits.argmax()), f"token {position} differs"
        sequence.append(token)


@torch.inference_mode()
def test_bfloat16_agrees_where_the_reference_is_sure(tiny: TinyCheckpoint) -> None:
    """The reference's own bfloat16 noise: how far its bfloat16 logits are from its float32 ones."""
    checkpoint, config = open_tiny(tiny)
    ids = [random.Random(2).randrange(4, 320) for _ in range(256)]
    ours = paged_logits(load_model(checkpoint, config, CPU, torch.bfloat16), [ids], [[256]], 16)
    exact = tiny.theirs(torch.tensor([ids])).logits[0]
    rounded = transformers.Glm4ForCausalLM.from_pretrained(tiny.path, dtype=torch.bfloat16)
    theirs = rounded(torch.tensor([ids])).logits[0].float()
    noise = (theirs - exact).abs().max()
    top2 = theirs.topk(2).values
    sure = top2[:, 0] - top2[:, 1] > noise
    assert sure.sum() >= 20, "too few positions to say anything"
    assert torch.equal(ours.argmax(-1)[sure], theirs.argmax(-1)[sure])
