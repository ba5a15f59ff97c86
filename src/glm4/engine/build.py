"""From options to an engine that runs: the memory planned, the ranks met, the weights loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from glm4 import device as devices
from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.device_mindspore import MindSporeDevice, adopt_msrun, check_options
from glm4.engine.draft_model import DraftModel, open_draft
from glm4.engine.engine import Engine
from glm4.engine.parallel_runner import ParallelRunner, follow
from glm4.engine.step import Runner
from glm4.engine.torch_runner import TorchRunner
from glm4.errors import Glm4Error, OptionError
from glm4.model.configuration_glm4 import Glm4Config
from glm4.model.loading import load_model
from glm4.model.modeling_glm4_infer import Glm4ForInference
from glm4.model.sharding import WHOLE, Shard
from glm4.model.utils import shapes_of
from glm4.ops.cpu import library
from glm4.options import GREEDY, EngineOptions, SamplingParams
from glm4.parallel.collectives import ALONE
from glm4.parallel.followers import Followers
from glm4.parallel.ranks import Ranks, join_ranks
from glm4.plan import MemoryPlan, gib, memory_limit
from glm4.quantization.weights import Weights
from glm4.text.tokenizer import Tokenizer

log = logging.getLogger("glm4")

OnLoad = Callable[[int, int], None]


@dataclass(slots=True)
class Built:
    """An engine, and what it was built from."""

    engine: Engine
    plan: MemoryPlan
    model: Glm4ForInference | None
    """None with backend mindspore."""
    ranks: Ranks | None


def build_engine(
    options: EngineOptions,
    folder: ModelFolder,
    config: Glm4Config,
    tokenizer: Tokenizer,
    said: SamplingParams,
    on_load: OnLoad,
    followers: Followers | None,
) -> Built:
    """Load the model of `folder`; `said`: the sampling that it advises; on_load(tensors done, tensors in all);
    `followers`: its other ranks, where this process has started them.

    A rank that only follows serves until its leader hangs up, and leaves with SystemExit.
    Raises a Glm4Error that names what is wrong with the options, the folder, the device, the memory or another rank.
    """
    mindspore = _open_mindspore(options) if options.backend == "mindspore" else None
    ranks = join_ranks(options, followers)
    try:
        parts = _Parts(options, folder, config, tokenizer, ranks, mindspore)
        num_blocks = parts.num_blocks
        if ranks is not None:
            num_blocks = ranks.agree(parts.fingerprint(), num_blocks)
        runner, drafter = parts.load(num_blocks, on_load)
        if ranks is not None:
            ranks.loaded()
    except BaseException as error:
        if ranks is not None:
            if isinstance(error, Glm4Error):
                ranks.fail(error)
            ranks.close(at_once=True)
        raise
    driven: Runner = runner
    if ranks is not None:
        if not ranks.place.is_leader:
            follow(runner, ranks)
            sys.exit(0)
        driven = ParallelRunner(runner, ranks)
    max_len = min(parts.max_len, num_blocks * options.block_size)
    engine = Engine(driven, tokenizer, said.over(GREEDY), config.eos_token_ids, max_len, options, drafter)
    if ranks is not None:
        weakref.finalize(engine, ranks.close)
    return Built(engine, parts.plan, runner.model if isinstance(runner, TorchRunner) else None, ranks)


def _open_mindspore(options: EngineOptions) -> MindSporeDevice:
    check_options(options)
    adopt_msrun()
    return MindSporeDevice.open(
        options.device, options.device_id, graph=options.graph_mode, size=options.tensor_parallel,
        threads=options.threads,
    )  # fmt: skip


class _Parts:
    """What is decided before anything is loaded."""

    def __init__(
        self,
        options: EngineOptions,
        folder: ModelFolder,
        config: Glm4Config,
        tokenizer: Tokenizer,
        ranks: Ranks | None,
        mindspore: MindSporeDevice | None,
    ) -> None:
        self._options, self._config, self._tokenizer, self._ranks = options, config, tokenizer, ranks
        self._mindspore = mindspore
        local_size = 1 if ranks is None else ranks.place.local_size
        self._set_threads(local_size)
        self._shard = WHOLE if ranks is None else Shard.of(ranks.place)
        self._checkpoint = Checkpoint.open(folder)
        stored = self._checkpoint.info("model.embed_tokens.weight").dtype
        if mindspore is not None:
            on_cpu, where = mindspore.target == "CPU", f"{mindspore.target} (MindSpore)"
            self._dtype, free = mindspore.dtype(options.dtype, stored), mindspore.free_memory()
        else:
            card = options.device_id + (0 if ranks is None else ranks.place.local_rank)
            on_cpu = options.device == "cpu" or devices.available_devices()[0] == "cpu"
            self._device = devices.select_device(options.device, 0 if on_cpu else card)
            if ranks is not None:
                ranks.connect(self._device)
            self._dtype = str(devices.select_dtype(options.dtype, stored, self._device)).removeprefix("torch.")
            free, where = devices.free_memory(self._device), str(self._device)
        self.max_len = _max_model_len(options, config)
        leads = ranks is None or ranks.place.is_leader
        self._draft = None
        if options.speculative_model is not None and leads:
            self._draft = open_draft(options.speculative_model, folder, tokenizer)
        weights = Weights(self._checkpoint, shapes_of(config), options.quantization)
        self.plan = MemoryPlan.of(
            config, options, self._dtype, self.max_len,
            draft=self._draft and self._draft[1], layouts=weights.layouts,
        )  # fmt: skip
        free //= local_size if on_cpu else 1
        limit = memory_limit(options.max_device_memory, free)
        self.num_blocks = self.plan.kv_blocks(limit, free)
        log.info(
            "%s, %s on %s: weights %s, KV cache for %d tokens in %s, %s allowed",
            folder.path.name, self.plan.weight_format, where, gib(self.plan.weights),
            self.num_blocks * options.block_size, self.plan.kv_dtype, gib(limit),
        )  # fmt: skip
        if mindspore is not None:
            mindspore.limit_memory(limit)
        elif on_cpu:
            log.info("CPU kernels: %s", library.kernels_summary())

    def _set_threads(self, local_size: int) -> None:
        """Ranks of one machine share its cores."""
        threads = self._options.threads
        if threads is None and local_size > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // local_size)
        if threads is not None:
            torch.set_num_threads(threads)
        library.set_threads(torch.get_num_threads())

    def fingerprint(self) -> str:
        """The same on every rank that can compute one model together with this one."""
        names = sorted(self._checkpoint.names())
        listed = [(name, self._checkpoint.info(name).dtype, self._checkpoint.info(name).shape) for name in names]
        machine_bound = ("model", "device_id", "max_device_memory", "threads", "speculative_model")
        options = {name: value for name, value in asdict(self._options).items() if name not in machine_bound}
        known = json.dumps([asdict(self._config), options, self._dtype, listed], sort_keys=True, default=str)
        return hashlib.sha256(known.encode()).hexdigest()

    def load(self, num_blocks: int, on_load: OnLoad) -> tuple[Runner, DraftModel | None]:
        """The runner of this rank, and the model that guesses, if there is one."""
        options, draft = self._options, self._draft
        total = len(list(self._shard.specs(self._config))) + (len(shapes_of(draft[1])) if draft else 0)
        done = 0

        def count(name: str) -> None:
            nonlocal done
            done += 1
            on_load(done, total)
            if self._ranks is not None:
                self._ranks.loading()

        def load_runner(checkpoint: Checkpoint, config: Glm4Config, ranks: Ranks | None) -> Runner:
            unknown_ids = self._tokenizer.unknown_ids(config.vocab_size)
            if self._mindspore is not None:
                from glm4.engine.mindspore_runner import MindSporeRunner  # loads MindSpore

                device = self._mindspore if ranks is not None else self._mindspore.alone()
                return MindSporeRunner(
                    checkpoint, config, device, self._dtype, num_blocks, options.block_size, unknown_ids, count
                )
            shard = WHOLE if ranks is None else self._shard
            collectives = ALONE if ranks is None else ranks.collectives
            model = load_model(
                checkpoint, config, self._device, getattr(torch, self._dtype), count, options.quantization, shard,
                collectives,
            )  # fmt: skip
            kv_dtype = getattr(torch, self.plan.kv_dtype)
            return TorchRunner(model, num_blocks, options.block_size, unknown_ids, kv_dtype, ranks)

        started = time.perf_counter()
        runner, drafter = load_runner(self._checkpoint, self._config, self._ranks), None
        if draft and self.plan.draft:
            drafter = DraftModel(load_runner(*draft, None), self.plan.draft.max_batch_tokens, self.plan.draft.context)
        log.info("loaded in %.1f s", time.perf_counter() - started)
        return runner, drafter


def _max_model_len(options: EngineOptions, config: Glm4Config) -> int:
    asked = options.max_model_len or config.max_context
    if asked > config.max_context:
        raise OptionError(
            f"max_model_len {asked} is beyond the {config.max_context} positions this model was made for: lower it, "
            "or add YaRN to config.json"
        )
    return asked
