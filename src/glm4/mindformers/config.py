"""YAML and flags to one checked job: defaults < YAML < flags."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4.errors import CheckpointError, OptionError, OutputError
from glm4.mindformers.keys import NO_GRAPH, Key, Said, find, parse
from glm4.mindformers.prompts import read_prompts
from glm4.mindformers.sources import find_config, read_flags, read_yaml
from glm4.options import EngineOptions, SamplingParams, nearest
from glm4.parallel.world import Degrees, Place

RESULT_FILE = "text_generation_result.txt"


@dataclass(frozen=True, slots=True)
class PredictJob:
    """All that a run needs, checked before any tensor library is loaded."""

    engine: EngineOptions
    sampling: SamplingParams
    prompts: tuple[str, ...]
    """As many as a multiple of `batch_size`."""
    batch_size: int
    use_chat_template: bool | None
    """None: where the folder has one."""
    result_path: Path
    output_dir: Path
    """The log of each rank goes to `log/rank_<rank>/info.log` below it, as in MindSpore Transformers."""
    place: Place
    """Which of the processes this one is."""
    notes: tuple[str, ...]
    """One line for each key that was given and changes nothing, with the reason."""

    @property
    def batches(self) -> list[list[str]]:
        """The prompts, `batch_size` at a time."""
        starts = range(0, len(self.prompts), self.batch_size)
        return [list(self.prompts[start : start + self.batch_size]) for start in starts]

    def share(self, batch: list[str]) -> list[str]:
        """What this process's copy of the model answers of a batch."""
        return batch[self.place.data_rank :: self.place.degrees.data]


def read_job(
    argv: Sequence[str], repository: Path | None = None, environment: Mapping[str, str] = os.environ
) -> PredictJob:
    """The job that the command line `argv` (without the program's name) and the YAML it names describe.

    `repository` is where `--config` is looked for after the caller's folder. Raises OptionError for a key, a flag
    or a value, PromptError for the prompts, CheckpointError for a model folder that does not exist, OutputError for
    a current folder that is gone.
    """
    result_path = _current_folder() / RESULT_FILE
    line = read_flags(argv)
    said = {**read_yaml(find_config(line.config, repository)), **line.said}
    values = _Values(said)
    _check_run_mode(values)
    engine = values.group("engine")
    place = _place(values, engine, environment)
    if engine.get("backend", "torch") == "torch" and engine.pop("graph_mode", None) is not None:
        values.notes.append(f"ignored: context.mode — {NO_GRAPH}")
    engine["model"] = _model_folder(values)
    engine["dtype"] = _dtype(values)
    if not (data := values.get("predict_data")):
        raise OptionError("predict_data is missing: pass --predict_data 'your question', or a file of prompts")
    prompts = read_prompts(data)
    batch_size = values.get("batch_size", 1)
    _check_batch_size(batch_size, len(prompts))
    return PredictJob(
        engine=EngineOptions(**engine),
        sampling=SamplingParams(**values.group("sampling")),
        prompts=prompts,
        batch_size=batch_size,
        use_chat_template=values.get("use_chat_template"),
        result_path=result_path,
        output_dir=values.get("output_dir") or Path("output"),
        place=place,
        notes=tuple(values.notes),
    )


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise OutputError("the current folder is not there any more: change into another one") from error


class _Values:
    """Parsed values by what they set ("engine.seed"), with where each was said."""

    def __init__(self, said: Mapping[str, Said]) -> None:
        self.notes: list[str] = []
        self._values: dict[str, tuple[Any, Said]] = {}
        for path, words in said.items():
            key = find(path)
            assert key is not None, "sources hands out known keys only"
            if key.refused and any(text.lower() not in ("", "false") for text in words.texts):
                raise OptionError(f"{words.where}: {key.refused}")
            value = parse(key, words) if words.texts else None
            if key.sets and words.texts:
                self._add(key, value, words)
            elif not key.sets:
                self.notes.append(f"ignored: {key.path} — {key.ignored or key.refused}")

    def _add(self, key: Key, value: Any, words: Said) -> None:
        """Keep it, unless another key that sets the same said something that counts more."""
        known = self._values.get(key.sets)
        if known and known[1].by_flag == words.by_flag and known[0] != value:
            raise OptionError(
                f"{words.where} says {value}, but {known[1].where} says {known[0]}: they mean the same, so keep one"
            )
        if known is None or words.by_flag:
            self._values[key.sets] = value, words

    def get(self, name: str, default: Any = None) -> Any:
        """The value of "job.`name`", or of a dotted name."""
        found = self._values.get(name if "." in name else f"job.{name}")
        return default if found is None else found[0]

    def where(self, name: str) -> str:
        """Where "job.`name`" was said; the name alone where it was not."""
        found = self._values.get(f"job.{name}")
        return name if found is None else found[1].where

    def group(self, group: str) -> dict[str, Any]:
        """All values of a group, by option name."""
        return {
            name.removeprefix(f"{group}."): value
            for name, (value, _) in self._values.items()
            if name.startswith(f"{group}.")
        }


def _check_run_mode(values: _Values) -> None:
    mode = values.get("run_mode", "predict")
    if mode in ("train", "finetune", "eval"):
        raise OptionError(f"{values.where('run_mode')}: {mode!r} is not part of this program, only 'predict' is")
    if mode != "predict":
        raise OptionError(f"{values.where('run_mode')}: unknown run_mode {mode!r}{nearest(mode, ['predict'])}")


def _place(values: _Values, engine: Mapping[str, Any], environment: Mapping[str, str]) -> Place:
    """Which process this is. Raises OptionError where the degrees do not multiply to the number of processes."""
    said = {
        "data_parallel": engine.get("data_parallel", 1),
        "model_parallel": engine.get("tensor_parallel", 1),
        "pipeline_stage": engine.get("pipeline_parallel", 1),
    }
    several = ", ".join(f"parallel_config.{name} {degree}" for name, degree in said.items() if degree > 1)
    if several and not values.get("use_parallel", False):
        raise OptionError(
            f"{several} needs use_parallel True, which is not said: pass --use_parallel True, or set the degree to 1"
        )
    degrees = Degrees(said["model_parallel"], said["pipeline_stage"], said["data_parallel"])
    processes = environment.get("WORLD_SIZE") or "1"
    if not (processes.isascii() and processes.isdigit()):
        raise OptionError(f"WORLD_SIZE: {processes!r} is not a whole number")
    if int(processes) != degrees.product:
        raise OptionError(
            f"the parallel degrees multiply to {degrees.product}, but the number of processes (WORLD_SIZE) is "
            f'{processes}: start {degrees.product} with bash scripts/msrun_launcher.sh "run_mindformer.py …" '
            f"{degrees.product}, or change a degree"
        )
    return Place.from_environment(degrees, environment)


def _model_folder(values: _Values) -> str:
    named, weights = values.get("pretrained_model_dir"), values.get("load_checkpoint")
    if named and weights and named.resolve() != weights.resolve():
        raise OptionError(
            f"load_checkpoint {weights} is another folder than pretrained_model_dir {named}: "
            "weights are read from the Hugging Face folder itself, so leave load_checkpoint out"
        )
    folder = named or weights
    if folder is None:
        raise OptionError(
            "pretrained_model_dir is missing: pass --pretrained_model_dir /path/hf_dir, or set it in YAML"
        )
    if not folder.is_dir():
        where = values.where("pretrained_model_dir" if named else "load_checkpoint")
        reason = "is a file, not a folder" if folder.is_file() else "does not exist"
        raise CheckpointError(f"{where}: {folder} {reason}: name the Hugging Face folder that holds config.json")
    return str(folder)


def _dtype(values: _Values) -> str:
    """compute_dtype, else params_dtype: weights are kept in the format they are computed in."""
    compute, stored = values.get("engine.dtype"), values.get("params.dtype")
    if compute and stored and compute != stored:
        values.notes.append(
            f"ignored: model.model_config.params_dtype — weights are kept in compute_dtype, which is {compute}"
        )
    return compute or stored or "auto"


def _check_batch_size(batch_size: int, prompts: int) -> None:
    if prompts % batch_size:
        fitting = [size for size in range(1, min(prompts, 64) + 1) if prompts % size == 0]
        raise OptionError(
            f"predict_batch_size {batch_size} does not divide the {prompts} prompts: "
            f"use {' or '.join(map(str, fitting))}, or change the number of prompts"
        )
