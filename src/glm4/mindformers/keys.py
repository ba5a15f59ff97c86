"""Every YAML key and flag of the MindSpore Transformers way in: what it sets here, or why it sets nothing.

Parsing, notes, error messages and `--help` all derive from the one table `KEYS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from glm4.errors import OptionError
from glm4.options import EngineOptions, SamplingParams, options_from, parse_bool


@dataclass(frozen=True, slots=True)
class Key:
    """One key, as a dotted path; exactly one of `sets`, `ignored`, `refused` is filled in."""

    path: str
    """A path that ends in ".*" stands for everything below it."""
    sets: str = ""
    """Group and name of what it sets: "engine.seed", "sampling.top_k", "job.batch_size"."""
    ignored: str = ""
    """Why it changes nothing."""
    refused: str = ""
    """Why it is an error (unless it says False, or nothing)."""
    kind: str = "text"
    """Type of a value that no option describes: a key of PARSERS."""
    flag: str = ""
    """A shorter flag that means the same, without dashes."""
    choices: tuple[str, ...] = ()
    """The only texts it takes."""
    means: dict[str, str] = field(default_factory=dict)
    """MindSpore's word (in lower case) to the option's."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a file or a flag says for one key: the texts as they were written, and where."""

    texts: tuple[str, ...]
    where: str
    by_flag: bool


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise OptionError(f"{text!r} is not a whole number") from error


def _count(text: str) -> int:
    number = _whole_number(text)
    if number < 1:
        raise OptionError(f"{number} is out of range (at least 1)")
    return number


def _true_or_false(text: str) -> bool:
    return parse_bool(text, "")


def path_of(text: str) -> Path | None:
    """The path that `text` names, `~` filled in; None for an empty text.

    Raises OptionError where nothing can have that name, or where we may not look.
    """
    if not text:
        return None
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise OptionError(f"{text!r} cannot be used as a path: {reason}") from error
    return path


PARSERS: dict[str, Callable[[str], object]] = {
    "text": str,
    "path": path_of,
    "whole number": _whole_number,
    "count": _count,
    "true or false": _true_or_false,
}
OPTION_GROUPS: dict[str, type] = {"engine": EngineOptions, "params": EngineOptions, "sampling": SamplingParams}
"""Groups whose values an option of glm4.options describes ("params" holds params_dtype, read as a dtype)."""

_NO_TRAINING = "training is not part of this program"
NO_GRAPH = "there is no MindSpore graph in this runner"
_FROM_FOLDER = "config.json in pretrained_model_dir decides"
_NOT_IN_THE_RESULT = ("logprobs", "prompt_logprobs", "n", "best_of")
_ONE_TEXT = "the result file has one text for a prompt; use glm4 batch, or LLM in Python, for more"
_IN_MODEL_CONFIG = (
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature"),
    *("top_k", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_TRAINING_SECTIONS = (
    *("runner_config", "runner_wrapper", "optimizer", "lr_schedule", "callbacks", "recompute_config"),
    *("train_dataset", "train_dataset_task", "eval_dataset", "eval_dataset_task", "metric"),
)
_TRAINING_FLAGS = (
    *("do_eval", "train_dataset_dir", "eval_dataset_dir", "resume_training", "epochs"),
    *("gradient_accumulation_steps", "sink_mode", "num_samples"),
)

KEYS: tuple[Key, ...] = (
    # what to do
    Key("run_mode", sets="job.run_mode"),
    Key("predict_data", sets="job.predict_data", kind="texts"),
    Key("predict_batch_size", sets="job.batch_size", kind="count"),
    Key("use_chat_template", sets="job.use_chat_template", kind="true or false"),
    Key("output_dir", sets="job.output_dir", kind="path"),
    # the model
    Key("pretrained_model_dir", sets="job.pretrained_model_dir", kind="path"),
    Key("load_checkpoint", sets="job.load_checkpoint", kind="path"),
    Key("load_ckpt_format", ignored="safetensors is the only format that is read", choices=("safetensors",)),
    Key("auto_trans_ckpt", ignored="tensors are always sharded while they load", kind="true or false"),
    Key("src_strategy_path_or_dir", ignored="safetensors need no strategy file"),
    Key("transform_process_num", ignored="nothing is transformed before it loads", kind="whole number"),
    Key("use_legacy", ignored="there is one implementation of the model", kind="true or false"),
    Key("trainer.*", ignored=_FROM_FOLDER),
    Key("processor.*", ignored="the tokenizer comes from pretrained_model_dir"),
    Key("model.arch.*", ignored=_FROM_FOLDER),
    Key("model.model_config.type", ignored=_FROM_FOLDER),
    Key("model.model_config.compute_dtype", sets="engine.dtype"),
    Key("model.model_config.params_dtype", sets="params.dtype"),
    Key("model.model_config.layernorm_compute_dtype", ignored="norms are always computed in float32"),
    Key("model.model_config.softmax_compute_dtype", ignored="softmax is always computed in float32"),
    Key("model.model_config.rotary_dtype", ignored="rotary angles are always computed in float32"),
    Key("model.model_config.max_length", sets="engine.max_model_len"),
    Key("model.model_config.seq_length", sets="engine.max_model_len"),
    Key("model.model_config.block_size", sets="engine.block_size"),
    Key("model.model_config.kv_cache_dtype", sets="engine.kv_cache_dtype"),
    Key("model.model_config.quantization", sets="engine.quantization"),
    Key(
        "model.model_config.num_blocks",
        ignored="the KV cache is sized from context.max_device_memory",
        kind="whole number",
    ),
    # how to go on
    Key("seed", sets="engine.seed"),
    Key("generation_config.max_length", sets="engine.max_model_len"),
    *(
        Key(
            f"generation_config.{option.name}",
            sets=f"sampling.{option.name}",
            flag=option.name if option.name == "do_sample" else "",
        )
        for option in fields(SamplingParams)
        if option.name not in _NOT_IN_THE_RESULT
    ),
    *(Key(f"generation_config.{name}", refused=_ONE_TEXT) for name in _NOT_IN_THE_RESULT),
    *(Key(f"model.model_config.{name}", sets=f"sampling.{name}") for name in _IN_MODEL_CONFIG),
    # where to run
    Key("context.device_id", sets="engine.device_id", flag="device_id"),
    Key(
        "context.device_target",
        sets="engine.device",
        flag="device_target",
        choices=("Ascend", "GPU", "CPU"),
        means={"ascend": "npu", "gpu": "cuda", "cpu": "cpu"},
    ),
    Key("context.max_device_memory", sets="engine.max_device_memory"),
    Key("context.backend", sets="engine.backend", flag="backend"),
    Key("context.mode", sets="engine.graph_mode", flag="mode", choices=("0", "1"), means={"0": "true", "1": "false"}),
    Key("context.enable_graph_kernel", ignored=NO_GRAPH, kind="true or false"),
    Key("context.ascend_config.*", ignored="weights and arithmetic keep the dtype of model.model_config.compute_dtype"),
    Key("context.save_graphs", ignored=NO_GRAPH, kind="true or false"),
    Key("context.save_graphs_path", ignored=NO_GRAPH),
    # several cards
    Key("use_parallel", sets="job.use_parallel", kind="true or false"),
    Key("parallel_config.data_parallel", sets="engine.data_parallel"),
    Key("parallel_config.model_parallel", sets="engine.tensor_parallel"),
    Key("parallel_config.pipeline_stage", sets="engine.pipeline_parallel"),
    Key("parallel_config.expert_parallel", ignored="GLM-4 has no experts", kind="count"),
    Key("parallel_config.micro_batch_num", ignored=_NO_TRAINING, kind="count"),
    Key("parallel_config.gradient_aggregation_group", ignored=_NO_TRAINING, kind="count"),
    Key("parallel_config.vocab_emb_dp", ignored="the engine decides how the embedding is sharded"),
    Key("parallel.*", ignored="parallel_config alone says how the model is split"),
    # not here
    *(Key(f"{name}.*", ignored=_NO_TRAINING) for name in _TRAINING_SECTIONS),
    *(Key(name, refused=_NO_TRAINING) for name in _TRAINING_FLAGS),
    Key("batch_size", refused=f"{_NO_TRAINING}; prompts in a batch are --predict_batch_size"),
    Key("only_save_strategy", refused="there are no strategy files to save"),
    Key("strategy_load_checkpoint", refused="safetensors need no strategy file"),
    Key("remote_save_url", refused="results are written on this machine only"),
    Key("profile", refused="there is no profiler in this program"),
    Key("modal_type", refused="GLM-4-0414 reads text only", kind="texts"),
    Key("adapter_id", refused="LoRA adapters are not in this version", kind="texts"),
    Key("register_path", ignored="no code from outside the program is loaded"),
)

BY_PATH: dict[str, Key] = {key.path.removesuffix(".*"): key for key in KEYS}
BY_FLAG: dict[str, Key] = BY_PATH | {key.flag: key for key in KEYS if key.flag}
SECTIONS: frozenset[str] = frozenset(
    path.rsplit(".", count)[0] for path in BY_PATH for count in range(1, path.count(".") + 1)
)


def find(path: str) -> Key | None:
    """The key that `path` is, or the section without checked contents that it lies in; None where it is unknown."""
    if path in BY_PATH:
        return BY_PATH[path]
    parents = (path.rsplit(".", count)[0] for count in range(1, path.count(".") + 1))
    return next((key for parent in parents if (key := BY_PATH.get(parent)) and key.path.endswith(".*")), None)


def did_you_mean(path: str, flags: Iterable[str] = ()) -> str:
    """The end of an error message: the known key or section, or the flag, nearest to `path`, if one is near.

    flags: those that are no keys, where `path` is a flag.
    """
    known = [*BY_FLAG, *flags, *sorted(SECTIONS)]
    leaf = path.rpartition(".")[2]
    same_leaf = [word for word in known if word.rpartition(".")[2] == leaf]
    near = same_leaf or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    return f"; did you mean {'--' if flags else ''}{near[0]}?" if near else "; --help lists what is known"


def parse(key: Key, said: Said) -> object:
    """The value that `said` gives `key`, in the type of what it sets.

    Raises OptionError that begins with the place where it was said.
    """
    group, _, name = key.sets.partition(".")
    try:
        if key.kind == "texts":
            return said.texts
        if group in OPTION_GROUPS and name in ("stop", "stop_token_ids"):
            return getattr(options_from(OPTION_GROUPS[group], {name: said.texts}), name)
        if len(said.texts) != 1:
            raise OptionError(f"takes one value, not {len(said.texts)}: {' '.join(said.texts)}")
        text = said.texts[0]
        if key.choices and text.lower() not in (choice.lower() for choice in key.choices):
            raise OptionError(f"{text!r} is none of: {', '.join(key.choices)}")
        text = key.means.get(text.lower(), text)
        if group in OPTION_GROUPS:
            return getattr(options_from(OPTION_GROUPS[group], {name: text}), name)
        return PARSERS[key.kind](text)
    except OptionError as error:
        raise OptionError(f"{said.where}: {str(error).removeprefix(f'{name}: ').removeprefix(': ')}") from error
