"""`glm4 verify`: a folder's logits here against transformers, and the level that earns.

The levels are those of MindSpore Transformers. A program can earn two of them by itself: Validated (the numbers
agree with the reference) and Preliminary (it runs, but they do not).

Quantised weights are other weights, so they earn no level: what is said then is how far the words move.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from glm4.errors import EngineError, OptionError
from glm4.options import BACKENDS, DTYPES, QUANTIZATIONS, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from glm4.engine.llm import LLM

_QUESTIONS = (
    "请介绍一下北京",
    "What is the capital of France, and why is it famous?",
    "用 Python 写一个函数，判断一个数是不是质数。",
    "Explain in one sentence why the sky is blue 🌤️",
)


@dataclass(frozen=True)
class Bounds:
    """How near to the reference the numbers must be to count as aligned."""

    max_difference: float
    """Of any logit."""
    cosine: float
    """Of any position's logits, at least."""
    kl: float
    """Nats, mean over the positions."""
    margin: float
    """Where the reference's two best tokens are nearer than this, either may come first."""


BOUNDS = {
    # float32 matrix products differ by 1e-7 to 5e-6 between libraries and row counts.
    "float32": Bounds(max_difference=1e-3, cosine=0.999999, kl=1e-6, margin=1e-3),
    # bfloat16 has 8 bits: two orders of adding differ by a few of its steps at every layer.
    "bfloat16": Bounds(max_difference=0.5, cosine=0.999, kl=1e-2, margin=0.25),
}


@dataclass(frozen=True)
class Comparison:
    """Our logits against the reference's, over every position of every prompt, and the greedy answers."""

    max_difference: float
    mean_difference: float
    cosine: float
    kl: float
    top1: float
    """Share of positions with the same best token, where the reference is sure."""
    greedy_equal: int
    greedy_total: int
    """Answers that are equal until the reference is unsure, and all of them."""

    def aligned(self, bounds: Bounds) -> bool:
        """Whether this earns Validated."""
        return (
            self.max_difference <= bounds.max_difference
            and self.cosine >= bounds.cosine
            and self.kl <= bounds.kl
            and self.top1 == 1.0
            and self.greedy_equal == self.greedy_total
        )


@click.command("verify", short_help="compare a folder with transformers")
@click.argument("model", type=click.Path())
@click.option("--dtype", type=click.Choice(DTYPES[1:]), default="float32", show_default=True, help="number format")
@click.option("--device", default="cpu", show_default=True, help="where our side runs; the reference runs on the CPU")
@click.option("--backend", type=click.Choice(BACKENDS), default="torch", show_default=True, help="what computes here")
@click.option("--tokens", type=click.IntRange(1, 512), default=32, show_default=True, help="greedy tokens per prompt")
@click.option(
    "--quantization",
    type=click.Choice(QUANTIZATIONS),
    default="none",
    show_default=True,
    help="say what it costs to round the weights so",
)
@click.option(
    "--against", type=click.Path(), metavar="DIR", help="say what MODEL's weights cost that were quantised from these"
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="use this prompt instead (repeatable)")
def command(
    model: str,
    dtype: str,
    device: str,
    backend: str,
    tokens: int,
    quantization: str,
    against: str | None,
    prompts: tuple[str, ...],
) -> None:
    """Compare the folder MODEL here with transformers (needs `pip install 'transformers>=5'`).

    One model is in memory at a time. Leaves with 0 when it is Validated and 1 when it is not. With --quantization or
    --against it says how far the original's words move instead, and leaves with 0.

    \b
    Examples:
      glm4 verify /path/hf_dir --dtype float32
      glm4 verify /path/hf_dir --dtype bfloat16 --tokens 64
      glm4 verify /path/hf_dir --quantization int4
      glm4 verify /path/hf_dir-int4 --against /path/hf_dir
    """
    if importlib.util.find_spec("transformers") is None:
        raise OptionError("verify compares with transformers, which is not installed: pip install 'transformers>=5'")
    original = _original(model, against)
    click.echo("running here …", err=True)
    options = {"dtype": dtype, "device": device, "backend": backend, "quantization": quantization}
    ids, ours, our_answers, unknown = _run_ours(model, options, tokens, prompts or _QUESTIONS)
    gc.collect()
    click.echo("running transformers …", err=True)
    theirs = _Reference(original, dtype, unknown)
    if against or quantization != "none":
        _report_cost(model, quantization, original, dtype, cost(ours, our_answers, ids, theirs))
        return
    ours = [logits[: len(prompt)] for logits, prompt in zip(ours, ids, strict=True)]
    comparison = compare(ours, our_answers, ids, theirs, BOUNDS[dtype].margin)
    _report(model, dtype, comparison, sum(map(len, ids)))
    raise click.exceptions.Exit(0 if comparison.aligned(BOUNDS[dtype]) else 1)


def _original(model: str, against: str | None) -> str:
    """The folder that transformers reads. Raises OptionError for one whose weights are quantised."""
    from glm4.checkpoint.folder import ModelFolder
    from glm4.quantization.weights import read_format

    original = against or model
    folder = ModelFolder.open(original)
    if read_format(folder.read_json("config.json"), folder.path / "config.json") is None:
        return original
    if against:
        raise OptionError(f"--against {against}: its weights are quantised, too; name the bfloat16 folder")
    raise OptionError(f"{model}: its weights are quantised; name the folder they were made from with --against DIR")


def _run_ours(
    model: str, options: dict[str, Any], tokens: int, prompts: tuple[str, ...]
) -> tuple[list[list[int]], list[Tensor], list[list[int]], list[int]]:
    """Prompt ids, logits of prompt and answer, greedy answers, and the ids that no tokenizer knows."""
    from glm4.engine.llm import LLM

    llm = LLM(model, **options)
    ids = [_encode(llm, prompt) for prompt in prompts]
    outputs = llm.generate(ids, SamplingParams(do_sample=False, max_new_tokens=tokens, ignore_eos=True))
    for output in outputs:
        if output.error is not None:
            raise EngineError(output.error)
    answers = [output.token_ids for output in outputs]
    sequences = [prompt + answer for prompt, answer in zip(ids, answers, strict=True)]
    logits = [each.cpu() for sequence in sequences for each in llm.logits(sequence)]  # one at a time: they are large
    return ids, logits, answers, llm.tokenizer.unknown_ids(llm.config.vocab_size)


def _encode(llm: LLM, prompt: str) -> list[int]:
    if llm.has_chat_template:
        return llm.encode_chat([{"role": "user", "content": prompt}])
    return llm.tokenizer.encode(prompt)


class _Reference:
    """transformers' model of the same folder."""

    def __init__(self, model: str, dtype: str, unknown: list[int]) -> None:
        import torch

        transformers: Any = importlib.import_module("transformers")
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        self.model = transformers.Glm4ForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.unknown = unknown

    def logits(self, token_ids: list[int]) -> Tensor:
        """float32 [tokens, vocab_size]."""
        import torch

        with torch.no_grad():
            found: Tensor = self.model(torch.tensor([token_ids])).logits[0].float()
        return found


def compare(
    ours: list[Tensor], our_answers: list[list[int]], ids: list[list[int]], theirs: Any, margin: float
) -> Comparison:
    """Compare logits position by position, and each greedy answer as far as the reference is sure of it.

    `theirs.logits(ids)` gives the reference's, `theirs.unknown` the ids that are masked on both sides. An answer is
    checked in one pass: the reference reads the prompt and our answer, and must prefer each of our tokens.
    """
    import torch

    biggest, total, count, cosine, kl, same, sure = 0.0, 0.0, 0, 1.0, 0.0, 0, 0
    equal, positions = 0, sum(map(len, ids))
    for mine, answer, prompt in zip(ours, our_answers, ids, strict=True):
        reference = theirs.logits(prompt + answer)
        reference, rest = reference[: len(prompt)], reference[len(prompt) - 1 : -1]
        difference = (mine - reference).abs()
        biggest = max(biggest, float(difference.max()))
        total, count = total + float(difference.double().sum()), count + difference.numel()
        cosine = min(cosine, float(torch.cosine_similarity(mine.double(), reference.double(), dim=-1).min()))
        log_p, log_q = reference.double().log_softmax(-1), mine.double().log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        certain = _margins(reference) > margin
        sure += int(certain.sum())
        same += int((mine.argmax(-1) == reference.argmax(-1))[certain].sum())
        rest[:, theirs.unknown] = -torch.inf
        agrees = rest.argmax(-1) == torch.tensor(answer)
        first_unsure = int((_margins(rest) <= margin).int().argmax()) if (_margins(rest) <= margin).any() else None
        equal += bool(agrees[:first_unsure].all())
    return Comparison(
        max_difference=biggest,
        mean_difference=total / count,
        cosine=cosine,
        kl=kl / positions,
        top1=same / sure if sure else 1.0,
        greedy_equal=equal,
        greedy_total=len(ids),
    )


@dataclass(frozen=True)
class Cost:
    """How far quantised weights move the original's words, over every position of prompts and greedy answers."""

    positions: int
    kl: float
    """Nats, mean: of the original's distribution relative to the quantised model's."""
    worst_kl: float
    top1: float
    """Share of positions with the same best token."""


def cost(ours: list[Tensor], our_answers: list[list[int]], ids: list[list[int]], theirs: Any) -> Cost:
    """Compare the quantised model's logits, of each prompt with its answer, with those of the original."""
    import torch

    divergences, same = [], []
    for mine, answer, prompt in zip(ours, our_answers, ids, strict=True):
        reference = theirs.logits(prompt + answer)
        log_p, log_q = reference.double().log_softmax(-1), mine.double().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(mine.argmax(-1) == reference.argmax(-1))
    every, agrees = torch.cat(divergences), torch.cat(same)
    return Cost(len(every), float(every.mean()), float(every.max()), float(agrees.double().mean()))


def _report_cost(model: str, quantization: str, original: str, dtype: str, found: Cost) -> None:
    what = model if quantization == "none" else f"{model} in {quantization}"
    click.echo(f"{what}, {found.positions} positions, against {original} in {dtype}:")
    click.echo(f"  {'KL divergence, mean':<38} {found.kl:>14.2e}")
    click.echo(f"  {'KL divergence, worst position':<38} {found.worst_kl:>14.2e}")
    click.echo(f"  {'same best token':<38} {found.top1:>14.2%}")


def _margins(logits: Tensor) -> Tensor:
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def _report(model: str, dtype: str, found: Comparison, positions: int) -> None:
    bounds = BOUNDS[dtype]
    click.echo(f"{model}, {dtype}, {positions} positions, against transformers:")
    for name, value, bound in (
        ("largest difference of a logit", f"{found.max_difference:.2e}", f"≤ {bounds.max_difference:g}"),
        ("mean difference", f"{found.mean_difference:.2e}", ""),
        ("cosine, worst position", f"{found.cosine:.8f}", f"≥ {bounds.cosine:g}"),
        ("KL divergence, mean", f"{found.kl:.2e}", f"≤ {bounds.kl:g}"),
        ("same best token (margin above " + f"{bounds.margin:g})", f"{found.top1:.2%}", "100%"),
        ("greedy answers equal", f"{found.greedy_equal} of {found.greedy_total}", "all"),
    ):
        click.echo(f"  {name:<38} {value:>14}   {bound}")
    level = "Validated" if found.aligned(bounds) else "Preliminary"
    meaning = "aligned with the reference" if level == "Validated" else "runs, but is not aligned with the reference"
    click.echo(f"level: {level} ({meaning})")
