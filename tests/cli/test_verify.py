"""`glm4 verify` tells an aligned folder from one that is not, and its numbers are those of plain numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from programs import Bench
from torch import Tensor

from glm4.cli.verify import BOUNDS, Bounds, Comparison, compare
from glm4.engine import build
from glm4.model.modeling_glm4_infer import Glm4ForInference

FEW = ("--tokens", "8", "--prompt", "hi", "--prompt", "你好")


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_sound_folder_is_validated(bench: Bench, dtype: str) -> None:
    ran = bench.glm4("verify", "model", "--dtype", dtype, *FEW)
    assert ran.code == 0
    assert "level: Validated" in ran.out
    assert "2 of 2" in ran.out


def test_other_weights_on_our_side_are_preliminary(bench: Bench) -> None:
    sound = build.load_model

    def perturbed(*arguments: object) -> Glm4ForInference:
        model: Glm4ForInference = sound(*arguments)  # type: ignore[arg-type]
        model.norm = model.norm * 1.02  # in place would write into the file, which is mapped read-only
        return model

    bench.monkeypatch.setattr(build, "load_model", perturbed)
    ran = bench.glm4("verify", "model", *FEW)
    assert ran.code == 1
    assert "level: Preliminary" in ran.out


@dataclass
class Recorded:
    """Stands for transformers: the logits of every sequence are known."""

    known: dict[tuple[int, ...], Tensor]
    unknown: list[int]

    def logits(self, token_ids: list[int]) -> Tensor:
        return self.known[tuple(token_ids)].clone()


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
def test_numbers_equal_numpy(seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    vocab, unknown, margin = 11, [9, 10], 0.2
    prompts = [list(rng.integers(0, 9, length)) for length in (1, 4, 7)]
    answers = [list(rng.integers(0, 9, 5)) for _ in prompts]
    theirs = [rng.normal(size=(len(p) + 5, vocab)).astype(np.float32) for p in prompts]
    ours = [
        logits[: len(prompt)] + noise * rng.normal(size=(len(prompt), vocab)).astype(np.float32)
        for prompt, logits in zip(prompts, theirs, strict=True)
    ]
    for prompt, answer, logits in zip(prompts[:2], answers, theirs, strict=False):  # two of the answers are greedy
        for step, token in enumerate(answer):
            logits[len(prompt) - 1 + step, token] = 9.0
    ours[0][-1], ours[1][-1] = theirs[0][len(prompts[0]) - 1], theirs[1][len(prompts[1]) - 1]
    recorded = Recorded(
        {tuple(p + a): torch.from_numpy(t) for p, a, t in zip(prompts, answers, theirs, strict=True)}, unknown
    )

    found = compare([torch.from_numpy(o) for o in ours], answers, prompts, recorded, margin)

    mine = np.concatenate(ours).astype(np.float64)
    reference = np.concatenate([t[: len(p)] for t, p in zip(theirs, prompts, strict=True)]).astype(np.float64)
    p, q = softmax(reference), softmax(mine)
    cosines = (mine * reference).sum(-1) / np.linalg.norm(mine, axis=-1) / np.linalg.norm(reference, axis=-1)
    two_best = np.sort(reference, axis=-1)[:, -2:]
    sure = two_best[:, 1] - two_best[:, 0] > margin
    same = mine.argmax(-1) == reference.argmax(-1)
    assert found.max_difference == pytest.approx(np.abs(mine - reference).max(), abs=1e-6)
    assert found.mean_difference == pytest.approx(np.abs(mine - reference).mean(), abs=1e-7)
    assert found.cosine == pytest.approx(cosines.min())
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), abs=1e-9)
    assert found.top1 == pytest.approx(same[sure].mean() if sure.any() else 1.0)
    greedy = [
        greedy_until_unsure(t[len(prompt) - 1 : -1], answer, unknown, margin)
        for t, prompt, answer in zip(theirs, prompts, answers, strict=True)
    ]
    assert greedy[:2] == [True, True]
    assert (found.greedy_equal, found.greedy_total) == (sum(greedy), 3)


def greedy_until_unsure(logits: np.ndarray, answer: list[int], unknown: list[int], margin: float) -> bool:
    """Whether each token of the answer is the best one, up to where two are about as good."""
    for row, token in zip(logits.copy(), answer, strict=True):
        row[unknown] = -np.inf
        best, second = sorted(row, reverse=True)[:2]
        if best - second <= margin:
            return True
        if row.argmax() != token:
            return False
    return True


@pytest.mark.parametrize(
    "worse",
    [
        {"max_difference": 0.2},
        {"max_difference": float("nan")},
        {"cosine": 0.8},
        {"kl": 0.2},
        {"top1": 0.99},
        {"greedy_equal": 3},
    ],
)
def test_one_number_out_of_bounds_is_enough(worse: dict[str, float]) -> None:
    bounds = Bounds(max_difference=0.1, cosine=0.9, kl=0.1, margin=0.1)
    at_the_bounds = Comparison(0.1, 0.05, 0.9, 0.1, 1.0, 4, 4)
    assert at_the_bounds.aligned(bounds)
    assert not replace(at_the_bounds, **worse).aligned(bounds)
