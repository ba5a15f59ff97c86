"""Train the demo model on demo/corpus and write demo/glm4-demo and demo/glm4-z1-demo.

    OMP_WAIT_POLICY=passive python tools/train_demo.py

(Passive: where other programs use the cores too, threads that wait actively make it several times slower.)
Two CPU cores take about 20 minutes. The state is kept in demo/training/ after each epoch: started again, it goes on
from there. The same seed, library version and machine give the same weights, interrupted or not.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_card import write_cards
from demo_corpus import SECTIONS, Encoder, Sample, Task, batches, load_tasks, vary, without_prefixes
from demo_folder import link_folder, train_tokenizer, write_configs, write_tokenizer, write_weights
from torch import Tensor
from torch.optim import AdamW

from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.modeling_glm4 import Glm4ForCausalLM
from glm4.text.chat import ChatTemplate
from glm4.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "demo"
CHAT, THINKING = DEMO / "glm4-demo", DEMO / "glm4-z1-demo"
VOCAB_SIZE = 3600
SHAPE = {
    "head_dim": 32,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
}
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside the corpus."""

    seed: int = 0
    epochs: int = 45
    batch_tokens: int = 2048
    peak_rate: float = 2e-3
    warm_up: int = 100
    weight_decay: float = 0.05
    varied: float = 0.25
    """Share of the one-question tasks that an epoch shows in a varied form."""

    def rate(self, step: int, steps: int) -> float:
        """Learning rate: a linear rise, then half a cosine down to a hundredth."""
        if step < self.warm_up:
            return self.peak_rate * (step + 1) / self.warm_up
        progress = (step - self.warm_up) / max(1, steps - self.warm_up)
        return self.peak_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def initialise(model: Glm4ForCausalLM, seed: int) -> None:
    """Normal weights, zero biases, and layers that start as small additions to the residual stream.

    GLM-4 normalises what a layer adds, so its size is the weight of that norm, not of the projection before it.
    """
    generator = torch.Generator().manual_seed(seed)
    small = (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith(("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")):
                parameter.fill_(small)
            elif parameter.dim() == 2:
                scale = 1.0 if "embed_tokens" in name else parameter.shape[1] ** -0.5
                parameter.normal_(0.0, scale, generator=generator)


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """input_ids and targets, int64 [batch, longest - 1]; targets are IGNORED outside the answers."""
    length = max(map(len, samples)) - 1
    inputs = torch.zeros(len(samples), length, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for row, sample in enumerate(samples):
        ids = torch.tensor(sample.ids)
        inputs[row, : len(ids) - 1] = ids[:-1]
        for start, end in sample.answers:
            targets[row, start - 1 : end - 1] = ids[start:end]
    return inputs, targets


def answer_logits(model: Glm4ForCausalLM, inputs: Tensor, wanted: Tensor) -> Tensor:
    """Logits [wanted positions, vocab] only where `wanted`: bool [batch, length]."""
    logits: Tensor = model.lm_head(model.model(inputs)[wanted])
    return logits


@torch.inference_mode()
def exact_answers(model: Glm4ForCausalLM, samples: Iterable[Sample], vocab: int) -> dict[str, tuple[int, int]]:
    """Answers that greedy decoding gives word for word, end included, and all answers, by section.

    Greedy decoding writes the answer exactly when the likeliest of the `vocab` known tokens is the answer's next
    one at each of its positions, so one forward pass over prompt and answer tells.
    """
    right, total = Counter[str](), Counter[str]()
    for batch in batches(list(samples), 8192, random.Random(0)):
        inputs, targets = collate(batch)
        wanted = targets != IGNORED
        guesses = torch.full_like(targets, IGNORED)
        guesses[wanted] = answer_logits(model, inputs, wanted)[:, :vocab].argmax(-1)
        for sample, same in zip(batch, (guesses == targets).all(1).tolist(), strict=True):
            total[sample.section] += 1
            right[sample.section] += same
    return {section: (right[section], total[section]) for section in SECTIONS if total[section]}


def share(counts: dict[str, tuple[int, int]]) -> float:
    return sum(right for right, _ in counts.values()) / sum(total for _, total in counts.values())


class Training:
    """The model on its way, and everything needed to go on after an interruption."""

    def __init__(self, config: Glm4Config, recipe: Recipe, tasks: list[Task], encoder: Encoder) -> None:
        self.recipe, self.encoder = recipe, encoder
        self.samples = [encoder.encode(task) for task in tasks]
        self.corpus = hashlib.sha256(repr(self.samples).encode()).hexdigest()
        self.lessons = without_prefixes(tasks, self.samples)
        self.openings = [t for t in tasks if t.section in ("talk", "facts", "arithmetic") and len(t.messages) == 1]
        self.model = Glm4ForCausalLM(config)
        initialise(self.model, recipe.seed)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95))
        self.epoch, self.seconds = 0, 0.0

    def run_epoch(self) -> float:
        """One pass over the corpus; returns the mean loss in nats a token."""
        started, recipe = time.monotonic(), self.recipe
        rng = random.Random(f"{recipe.seed} {self.epoch}")
        shown = [self._shown(task, sample, rng) for task, sample in self.lessons]
        losses = []
        plan = batches(shown, recipe.batch_tokens, rng)
        for number, batch in enumerate(plan):
            done = self.epoch + number / len(plan)
            rate = recipe.rate(int(done * len(plan)), recipe.epochs * len(plan))
            losses.append(self._step(batch, rate))
        self.epoch += 1
        self.seconds += time.monotonic() - started
        return sum(losses) / len(losses)

    def _shown(self, task: Task, sample: Sample, rng: random.Random) -> Sample:
        varied = vary(task, self.openings, rng) if rng.random() < self.recipe.varied else task
        return sample if varied is task else self.encoder.encode(varied)

    def _step(self, batch: list[Sample], rate: float) -> float:
        inputs, targets = collate(batch)
        wanted = targets != IGNORED
        # a context for each step: autocast keeps its bfloat16 copies of the weights until the context ends
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(answer_logits(self.model, inputs, wanted), targets[wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def save(self, file: Path) -> None:
        """The state, written beside `file` and then renamed, so that an interruption leaves the older one whole."""
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": asdict(self.recipe),
            "corpus": self.corpus,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)

    def resume(self, file: Path) -> None:
        """Go on from `file`, unless it is missing or of another recipe or corpus."""
        if not file.exists():
            return
        state: dict[str, Any] = torch.load(file)
        if (state["recipe"], state["corpus"]) != (asdict(self.recipe), self.corpus):
            print(f"{file} is of another recipe or corpus: starting anew", flush=True)
            return
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        print(f"going on after epoch {self.epoch}", flush=True)


def corpus_texts(tasks: Iterable[Task], templates: Sequence[ChatTemplate]) -> list[str]:
    """Every distinct text the model reads or writes: what the tokenizer's words come from."""
    texts = set[str]()
    for task in tasks:
        texts |= {task.answer, *(message["content"] for message in task.messages)}
        if task.tools:
            texts |= {template.render([{"role": "user", "content": ""}], task.tools) for template in templates}
    return sorted(texts)


def train(training: Training, vocab: int, minutes: float) -> bool:
    """Run the recipe's epochs, keeping the state after each; False when `minutes` were over first."""
    state, recipe = DEMO / "training" / "state.pt", training.recipe
    training.resume(state)
    while training.epoch < recipe.epochs:
        if training.seconds > minutes * 60:
            return False
        loss = training.run_epoch()
        training.save(state)
        line = f"epoch {training.epoch}/{recipe.epochs}  loss {loss:.4f}  {training.seconds / 60:.1f} min"
        if training.epoch % 5 == 0:
            line += f"  exact answers {share(exact_answers(training.model, training.samples, vocab)):.1%}"
        print(line, flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40, help="stop after this long; run again to go on")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="passes over the corpus")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    tasks = load_tasks(DEMO / "corpus")
    templates = [ChatTemplate.from_folder(folder) for folder in (CHAT, THINKING)]
    backend = train_tokenizer(corpus_texts(tasks, templates), VOCAB_SIZE)
    write_tokenizer(CHAT, backend)
    values = write_configs(CHAT, backend, SHAPE)
    tokenizer = Tokenizer.from_folder(CHAT)
    recipe = Recipe(seed=options.seed, epochs=options.epochs)
    training = Training(Glm4Config.from_dict(values), recipe, tasks, Encoder(tokenizer, *templates))
    if not train(training, tokenizer.vocab_size, options.minutes):
        print(f"{options.minutes:g} minutes are over: run this again to go on", flush=True)
        return

    model = training.model.to(torch.bfloat16)
    write_weights(CHAT, model.state_dict())
    scores = {
        "bfloat16": exact_answers(model, training.samples, tokenizer.vocab_size),
        "float32": exact_answers(model.float(), training.samples, tokenizer.vocab_size),
    }
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "known": tokenizer.vocab_size,
        "cities": len({task.answer for task in tasks if task.section == "cities"}) // 2,
        "longest": max(map(len, training.samples)),
        "epochs": recipe.epochs,
        "minutes": training.seconds / 60,
    }
    write_cards(CHAT, THINKING, values, scores, facts)
    link_folder(THINKING, CHAT, own=("README.md", "chat_template.jinja"))
    print(f"exact answers: {share(scores['bfloat16']):.1%} in bfloat16, {share(scores['float32']):.1%} in float32")


if __name__ == "__main__":
    main()
