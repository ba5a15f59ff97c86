"""`glm4 plan`: what a model needs, what fits where, and the YAML for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from glm4.errors import OptionError
from glm4.model.utils import shapes_of
from glm4.options import DTYPES, KV_CACHE_DTYPES, QUANTIZATIONS, EngineOptions, parse_memory
from glm4.plan import MemoryPlan, gib, memory_limit
from glm4.quantization.layout import chosen_layouts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from glm4.model.configuration_glm4 import Glm4Config
    from glm4.quantization.layout import Layout

_MEMORY_SIZES = (16, 24, 30, 48, 59, 80)
_CARDS = (1, 2, 4, 8)


@click.command("plan", short_help="what a model needs in memory, and what fits where")
@click.argument("model", type=click.Path())
@click.option("--dtype", type=click.Choice(DTYPES[1:]), default="bfloat16", show_default=True, help="number format")
@click.option(
    "--quantization",
    type=click.Choice(QUANTIZATIONS),
    default="none",
    show_default=True,
    help="weights rounded while they load; none: as they are stored",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(KV_CACHE_DTYPES),
    default="auto",
    show_default=True,
    help="number format of the KV cache; auto: --dtype",
)
@click.option(
    "--memory", metavar="SIZE", help="memory of one card, such as 59GB, or 80% of what is free here [default: 100%]"
)
@click.option("--cards", type=click.Choice([str(n) for n in _CARDS]), help="how many cards share the model")
@click.option("--context", type=click.IntRange(min=1), help="longest prompt plus answer [default: the model's limit]")
def command(
    model: str,
    dtype: str,
    quantization: str,
    kv_cache_dtype: str,
    memory: str | None,
    cards: str | None,
    context: int | None,
) -> None:
    """Say what the folder MODEL needs in memory, before anything is loaded (config.json is enough).

    \b
    Examples:
      glm4 plan /path/hf_dir
      glm4 plan /path/hf_dir --memory 59GB --cards 2
      glm4 plan /path/hf_dir --memory 8GB --quantization int4
    """
    from rich.console import Console

    config, layouts = _read_config(model, quantization)
    context = _checked_context(context, config)
    limit = _size(memory or "100%")
    options = EngineOptions(kv_cache_dtype=kv_cache_dtype, quantization=quantization)
    plan = MemoryPlan.of(config, options, dtype, context, layouts=layouts)
    console = Console(highlight=False)
    console.print(_needs(plan, model))
    console.print(_fits(plan))
    _advise(console, plan, model, limit, int(cards) if cards else None)


def _size(memory: str) -> int:
    """Bytes in `memory`; an amount is that of a card which may be elsewhere, a share is of what is free here."""
    try:
        asked = parse_memory(memory)
    except OptionError as error:
        raise OptionError(f"--memory: {error}") from error
    return memory_limit(asked, _free_memory()) if isinstance(asked, float) else asked


def _read_config(model: str, quantization: str) -> tuple[Glm4Config, dict[str, Layout]]:
    """The model's shape, and the weights that will be held in 4 or 8 bits."""
    from glm4.checkpoint.folder import ModelFolder
    from glm4.model.configuration_glm4 import Glm4Config
    from glm4.quantization.weights import expected_layouts, read_format

    folder = ModelFolder.open(model)
    values, file = folder.read_json("config.json"), folder.path / "config.json"
    config = Glm4Config.from_dict(values, str(file))
    return config, expected_layouts(read_format(values, file), shapes_of(config), quantization)


def _checked_context(context: int | None, config: Glm4Config) -> int:
    if context is not None and context > config.max_context:
        raise OptionError(f"--context {context}: this model was made for {config.max_context} positions at most")
    return context or config.max_context


def _free_memory() -> int:
    from glm4.device import free_memory, select_device

    return free_memory(select_device("auto"))


def _needs(plan: MemoryPlan, model: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from glm4.ops.cpu.library import kernels_summary

    config = plan.config
    table = Table(title=escape(model), show_header=False, title_justify="left")
    rows = {
        "parameters": f"{_count(plan.num_parameters)}, {config.num_hidden_layers} layers",
        "weights": ", ".join(f"{gib(choice.weights)} in {choice.weight_format}" for choice in _weight_choices(plan)),
        "KV cache": f"{gib(plan.kv_per_token * 1024)} per 1,024 tokens, "
        f"{gib(plan.kv_per_token * plan.context)} for one request of {plan.context:,} ({plan.kv_dtype})",
        "workspace": f"{gib(plan.workspace)} for steps of {plan.max_batch_tokens:,} tokens",
        "context": f"{config.max_context:,} tokens",
        "on this CPU": f"kernels: {kernels_summary()}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _weight_choices(plan: MemoryPlan) -> list[MemoryPlan]:
    """The number formats that weights could be held in; those that are stored quantised stay as they are."""
    if plan.layouts and plan.quantization == "none":
        return [plan]
    shapes = shapes_of(plan.config)
    rounded = [replace(plan, layouts=chosen_layouts(shapes, name)) for name in QUANTIZATIONS[1:]]
    return [*(replace(plan, dtype=name, layouts={}) for name in DTYPES[1:]), *rounded]


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _fits(plan: MemoryPlan) -> Table:
    from rich.table import Table

    formats = plan.weight_format if plan.kv_dtype == plan.weight_format else f"{plan.weight_format}, KV {plan.kv_dtype}"
    table = Table(title=f"tokens that the KV cache holds, {formats} (– : does not fit)", title_justify="left")
    table.add_column("memory of a card")
    for cards in _CARDS:
        table.add_column("1 card" if cards == 1 else f"{cards} cards", justify="right")
    for size in _MEMORY_SIZES:
        cells = []
        for cards in _CARDS:
            tokens = replace(plan, cards=cards).kv_tokens(size * 2**30)
            cells.append(f"{tokens:,}" if tokens else "–")
        table.add_row(f"{size} GiB", *cells)
    return table


def _advise(console: Console, plan: MemoryPlan, model: str, limit: int, cards: int | None) -> None:
    """Whether it fits in `limit` (on `cards` cards, else on the fewest), and the YAML for MindSpore Transformers."""
    choices = [replace(plan, cards=cards)] if cards else [replace(plan, cards=n) for n in _CARDS]
    fitting = [choice for choice in choices if choice.kv_tokens(limit)]
    if not fitting:
        choices[0].kv_blocks(limit)  # raises, and says what would fit
    best = fitting[0]
    where = "one card" if best.cards == 1 else f"{best.cards} cards"
    console.print(
        f"fits on {where} with {gib(limit)} each: {gib(best.weights)} weights, "
        f"{best.kv_tokens(limit):,} tokens of KV cache"
    )
    click.echo("\n# the keys of configs/glm4/predict_glm4.yaml that say so")
    click.echo(_yaml(best, model, limit), nl=False)  # the console would wrap long lines


def _yaml(plan: MemoryPlan, model: str, limit: int) -> str:
    import yaml

    memory = f"{limit // 2**20}MB" if limit % 2**30 else f"{limit // 2**30}GB"
    model_config: dict[str, str | int] = {"compute_dtype": plan.dtype, "max_length": plan.context}
    if plan.kv_dtype != plan.dtype:
        model_config["kv_cache_dtype"] = plan.kv_dtype
    keys = {
        "pretrained_model_dir": model,
        "use_parallel": plan.cards > 1,
        "parallel_config": {"data_parallel": 1, "model_parallel": plan.cards},
        "model": {"model_config": model_config},
        "context": {"max_device_memory": memory},
    }
    text: str = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=10_000)
    return text
