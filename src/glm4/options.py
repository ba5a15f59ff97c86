"""Every option once: its name, type, default and one line of help.

The command line, the YAML files, the Python API and the docs derive from these frozen dataclasses.
`None` means «not said»: the model folder, and then the defaults below, decide.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from glm4.errors import OptionError

_MOST = 2**31 - 1
"""Larger than any number of tokens."""
DEVICES = ("auto", "cpu", "cuda", "npu")
BACKENDS = ("torch", "mindspore")
DTYPES = ("auto", "bfloat16", "float32")
KV_CACHE_DTYPES = (*DTYPES, "int8")
QUANTIZATIONS = ("none", "int8", "int4")


def _option(default: Any, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"help": help, **limits})


def _parse_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """(token id, bias) pairs from an object or its JSON text, as OpenAI's API writes them."""
    try:
        entries = json.loads(value) if isinstance(value, str) else value
        pairs = entries.items() if isinstance(entries, Mapping) else entries
        bias = tuple(sorted((int(token_id), float(amount)) for token_id, amount in pairs))
    except (TypeError, ValueError) as error:
        raise OptionError(f'{value!r} is no object of token ids and numbers: write it like {{"123": -5}}') from error
    if not all(token_id >= 0 and -100 <= amount <= 100 for token_id, amount in bias):
        raise OptionError("token ids are at least 0, and a bias is between -100 and 100")
    return bias


def _parse_json_schema(value: Any) -> str:
    """The text of a schema, which may be given as the object itself."""
    try:
        return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"holds what JSON cannot: {error}") from error


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is continued.

    Greedy unless the caller, or the folder's generation_config.json, says otherwise: a temperature of 0 is
    greedy, and naming any of temperature, top_k, top_p or min_p means sampling.

    Raises OptionError when a value is outside its range.
    """

    max_new_tokens: int | None = _option(
        None, "tokens to generate at most; none: until the model stops", low=1, high=_MOST
    )
    min_new_tokens: int | None = _option(None, "tokens to generate before the model may stop", low=0, high=_MOST)
    do_sample: bool | None = _option(None, "draw tokens at random instead of taking the likeliest")
    temperature: float | None = _option(
        None, "flatten (above 1) or sharpen (below 1) the distribution", low=0.0, high=100.0
    )
    top_k: int | None = _option(None, "sample among the k likeliest tokens; 0: all", low=0, high=_MOST)
    top_p: float | None = _option(
        None, "sample among the likeliest tokens that hold this probability", above=0.0, high=1.0
    )
    min_p: float | None = _option(
        None, "drop tokens below this share of the likeliest one's probability", low=0.0, high=1.0
    )
    repetition_penalty: float | None = _option(
        None, "above 1: make tokens already seen less likely", low=0.01, high=100.0
    )
    presence_penalty: float | None = _option(
        None, "subtracted once from every token already generated", low=-2.0, high=2.0
    )
    frequency_penalty: float | None = _option(
        None, "subtracted for each time a token was generated", low=-2.0, high=2.0
    )
    stop: tuple[str, ...] = _option((), "texts that end the answer (they are not part of it)")
    stop_token_ids: tuple[int, ...] = _option((), "token ids that end the answer, beside the folder's own", low=0)
    ignore_eos: bool | None = _option(None, "go on past the model's own end of answer")
    seed: int | None = _option(None, "same seed, same words, whatever else runs beside it", low=0, high=2**62)
    logit_bias: tuple[tuple[int, float], ...] = _option(
        (), 'added to the logits of these token ids, as JSON: {"123": -5}', parse=_parse_logit_bias
    )
    json_schema: str | None = _option(None, "a JSON schema that the answer satisfies", parse=_parse_json_schema)
    regex: str | None = _option(None, "a regular expression that the whole answer matches")
    choice: tuple[str, ...] = _option((), "texts of which the answer is one")
    grammar: str | None = _option(None, "a grammar in Lark's syntax, or GBNF, that the answer follows")
    n: int | None = _option(None, "answers to one prompt", low=1, high=128)
    best_of: int | None = _option(None, "answers to draw, of which the n likeliest are kept", low=1, high=128)
    num_beams: int | None = _option(None, "beams to search with for the likeliest answer; 1: no search", low=1, high=16)
    length_penalty: float | None = _option(
        None, "beam search: answers count by log-probability over length to this power", low=-10.0, high=10.0
    )
    early_stopping: bool | None = _option(None, "beam search: stop as soon as num_beams answers are found")
    prompt_logprobs: int | None = _option(
        None, "log-probabilities of this many likeliest tokens at each position of the prompt", low=0, high=20
    )
    logprobs: int | None = _option(None, "log-probabilities of this many likeliest tokens at each step", low=0, high=20)
    skip_special_tokens: bool | None = _option(None, "leave control tokens out of the text")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.choice, str):
            object.__setattr__(self, "choice", (self.choice,))
        if isinstance(self.choice, list) and not self.choice:
            raise OptionError("choice: the list is empty: give the texts of which the answer is one")
        for name in ("stop", "stop_token_ids", "choice"):
            value = () if (value := getattr(self, name)) is None else value
            if not isinstance(value, Iterable):
                raise OptionError(f"{name}: {value!r} is not a list")
            object.__setattr__(self, name, tuple(value))
        if not isinstance(self.json_schema, str | None):
            object.__setattr__(self, "json_schema", _parse_json_schema(self.json_schema))
        object.__setattr__(self, "logit_bias", _parse_logit_bias(self.logit_bias))
        _check_ranges(self)
        if "" in self.stop:
            raise OptionError("stop: an empty text would end every answer at once; leave it out")
        if self.do_sample and self.temperature == 0:
            raise OptionError("temperature 0 means greedy: raise it, or set do_sample to false")
        if self.max_new_tokens is not None and (self.min_new_tokens or 0) > self.max_new_tokens:
            raise OptionError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}: lower one or "
                "raise the other"
            )
        if len(self.constraints) > 1:
            raise OptionError(f"give one of {' and '.join(self.constraints)}: an answer is held to one form")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise OptionError(f"best_of {self.best_of} is below n {self.n or 1}: draw at least as many as are kept")

    @property
    def constraints(self) -> dict[str, Any]:
        """What holds the answer to a form, by the option's name: at most one."""
        said = {name: getattr(self, name) for name in ("json_schema", "regex", "choice", "grammar")}
        return {name: value for name, value in said.items() if value not in (None, ())}

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """These values where they are said, `defaults` elsewhere.

        Sampling knobs are taken as one group: a caller who says do_sample=False, or names a knob, is not mixed
        with a folder that says the opposite.
        """
        said = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None and v != ()}
        if "do_sample" not in said:
            if "temperature" in said:
                said["do_sample"] = said["temperature"] > 0
            elif any(said.get(name) is not None for name in ("top_k", "top_p", "min_p")):
                said["do_sample"] = True
        if said.get("do_sample") is not None and not said["do_sample"]:
            said.pop("temperature", None)
            defaults = replace(defaults, do_sample=False, temperature=None)
        elif said.get("do_sample") and defaults.temperature == 0:
            defaults = replace(defaults, temperature=None)
        return replace(defaults, **said)


def parse_memory(value: str | int | float) -> int | float:
    """An amount of memory: bytes as an int, or a share of the free memory as a float above 0 and at most 1.

    "59GB" (2**30 each, as MindSpore counts), "800MB" and a whole number that is no text are bytes; "80%", "0.8" and
    0.8 are shares. Raises OptionError for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,20})?)\s*(%|B|[KMGT]I?B?)?\s*", str(value), re.IGNORECASE)
    number, unit = (float(match[1]), (match[2] or "").upper()) if match else (0.0, "")
    if unit == "%":
        if 0 < number <= 100:
            return number / 100
        raise OptionError(f"{value!r} is not a share of the free memory: it is above 0% and at most 100%")
    if unit and (size := int(number * 1024 ** "BKMGT".index(unit[0]))) > 0:
        return size
    if match and not unit and "." in match[1] and 0 < number <= 1:  # a whole number alone could mean bytes, or GB
        return number
    raise OptionError(f"{value!r} is not an amount of memory: write it like 59GB, 800MB or 80% (of what is free)")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine is built from: the folder, the device and its limits.

    Raises OptionError when a value is outside its range.
    """

    model: str = _option("", "the Hugging Face folder of the model")
    backend: str = _option("torch", "library that computes; mindspore has an environment of its own", choices=BACKENDS)
    graph_mode: bool = _option(True, "with backend mindspore, compile the model; no: run it operation by operation")
    device: str = _option("auto", "where to run", choices=DEVICES)
    device_id: int = _option(0, "which of the machine's cards, counted from 0", low=0)
    tensor_parallel: int = _option(1, "cards (or processes) that share every matrix", low=1)
    pipeline_parallel: int = _option(1, "stages that hold some of the layers each", low=1)
    data_parallel: int = _option(1, "whole copies of the model that answer different requests", low=1)
    rank_timeout: float = _option(60.0, "seconds that a rank may be silent before the others give up", above=0.0)
    dtype: str = _option("auto", "number format of the weights and the arithmetic", choices=DTYPES)
    quantization: str = _option(
        "none", "round the weights to 8 or 4 bits while they load (none: as they are stored)", choices=QUANTIZATIONS
    )
    max_device_memory: int | float | None = _option(
        None, "use at most this much memory, such as 59GB, or 80% of what is free; none: all of it", parse=parse_memory
    )
    max_model_len: int | None = _option(None, "longest prompt plus answer; none: the model's own limit", low=1)
    max_batch_tokens: int = _option(2048, "tokens computed in one step at most", low=1)
    step_stretch: float | None = _option(
        None,
        "let chunks of prompts make a step take at most about this many times as long while answers are under way; "
        "none: as long as max_batch_tokens makes it",
        above=1.0,
    )
    max_batch_requests: int = _option(64, "requests running side by side at most", low=1)
    block_size: int = _option(16, "tokens in one block of the KV cache", low=1, high=1024)
    kv_cache_dtype: str = _option(
        "auto", "number format of the KV cache; auto: that of the arithmetic", choices=KV_CACHE_DTYPES
    )
    speculative_tokens: int = _option(
        0, "tokens to guess in each step where that pays; answers stay the same; 0: none", low=0, high=16
    )
    speculative_model: str | None = _option(
        None, "folder of a smaller model with the same tokenizer that guesses; none: from what the text said before"
    )
    prefix_caching: bool = _option(True, "let prompts that begin alike share what was computed for one of them")
    threads: int | None = _option(None, "CPU threads; none: one for each core", low=1)
    seed: int | None = _option(None, "seed of requests that bring none of their own", low=0)

    def __post_init__(self) -> None:
        if self.dtype == "float16":
            raise OptionError("dtype float16: GLM-4 overflows in it and answers '!!!!'; use bfloat16 or float32")
        if self.max_device_memory is not None:
            object.__setattr__(self, "max_device_memory", parse_memory(self.max_device_memory))
        _check_ranges(self)
        if self.speculative_model is not None and not self.speculative_tokens:
            raise OptionError("speculative_model: say with speculative_tokens how many tokens it may guess, such as 4")


def _parse_bytes(value: str | int) -> int:
    size = parse_memory(value)
    if isinstance(size, float):
        raise OptionError(f"{value!r} is not a number of bytes: write it like 8MB")
    return size


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the HTTP server listens, whom it lets in and how much it takes.

    Raises OptionError when a value is outside its range.
    """

    host: str = _option("127.0.0.1", "address to listen on; 0.0.0.0: every one of this machine")
    port: int = _option(8000, "port to listen on; 0: any free one", low=0, high=65535)
    served_model_name: tuple[str, ...] = _option((), "what requests call the model; none: the name of its folder")
    api_key: tuple[str, ...] = _option((), "key that a request must bring, one of several", secret=True)
    api_key_file: str | None = _option(None, "file of such keys, one a line; lines that begin with # are comments")
    tls_cert: str | None = _option(None, "file of the certificate, and those above it, for https")
    tls_key: str | None = _option(None, "file of the certificate's private key")
    cors_origins: tuple[str, ...] = _option((), "web origin whose pages may send requests, such as https://a.example")
    max_body: int = _option(8 * 2**20, "longest body of a request, such as 8MB", parse=_parse_bytes)
    max_prompt_tokens: int | None = _option(None, "longest prompt; none: what the model can take", low=1)
    max_answer_tokens: int | None = _option(None, "longest answer; none: what the model can give", low=1)
    max_queue: int = _option(256, "answers that may wait beside those being computed; more are refused", low=0)
    request_timeout: float = _option(600.0, "seconds that a request may take in all", above=0.0)
    drain_timeout: float = _option(60.0, "seconds that requests get to end in when the server is stopped", low=0.0)
    log_prompts: bool = _option(False, "write prompts into the log, too")

    def __post_init__(self) -> None:
        _check_ranges(self)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise OptionError("tls_cert and tls_key belong together: give both, or neither")


def _check_ranges(options: SamplingParams | EngineOptions | ServerOptions) -> None:
    for option in fields(options):
        value, limits = getattr(options, option.name), option.metadata
        if value is None:
            continue
        if "choices" in limits and value not in limits["choices"]:
            raise OptionError(f"{option.name}: {value!r} is none of {', '.join(limits['choices'])}")
        if "parse" in limits:  # checked where it is parsed
            continue
        for number in value if isinstance(value, tuple) else (value,):
            _check_type(option, number)
            low, high, above = limits.get("low"), limits.get("high"), limits.get("above")
            if isinstance(number, str) or (low is None and high is None and above is None):
                continue
            in_range = (
                (low is None or number >= low)
                and (high is None or number <= high)
                and (above is None or number > above)
            )
            if not in_range:  # written so that NaN fails too
                raise OptionError(f"{option.name}: {number} is out of range ({_range_text(low, high, above)})")


def _check_type(option: Field[Any], value: Any) -> None:
    kind = option_kind(option)
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise OptionError(f"{option.name}: {value!r} is not {_KIND_NAMES[kind]}")
    if isinstance(value, float) and math.isinf(value):
        raise OptionError(f"{option.name}: {value} is not a finite number")


def _range_text(low: float | None, high: float | None, above: float | None) -> str:
    limits = (("above", above), ("at least", low), ("at most", high))
    parts = [
        f"{word} {limit if isinstance(limit, int) else f'{limit:g}'}" for word, limit in limits if limit is not None
    ]
    return ", ".join(parts)


_KIND_NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


def option_kind(option: Field[Any]) -> type:
    """The Python type of one value of `option`: int, float, bool or str."""
    name = str(option.type).removeprefix("tuple[").split(" | ")[0].split(",")[0].strip()
    return {"int": int, "float": float, "bool": bool, "str": str}[name]


def parse_bool(value: str | bool, name: str) -> bool:
    """True or False from any spelling of them; OptionError, naming the option, otherwise."""
    word = str(value).strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise OptionError(f"{name}: {value!r} is neither True nor False")


def parse_option(option: Field[Any], value: Any) -> Any:
    """`value`, as a shell, an environment or a YAML file writes it, as the type that `option` has.

    A text for an option that holds several values becomes one of them; "none" is None where that is allowed.
    Raises OptionError, naming the option.
    """
    if "parse" in option.metadata and value is not None:
        try:
            return option.metadata["parse"](value)
        except OptionError as error:
            raise OptionError(f"{option.name}: {error}") from error
    if str(option.type).startswith("tuple"):
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_parse_one(option, item) for item in items)
    if (value is None or str(value).strip().lower() in ("none", "null")) and "None" in str(option.type):
        return None
    return _parse_one(option, value)


def _parse_one(option: Field[Any], value: Any) -> Any:
    kind = option_kind(option)
    if kind is bool:
        return parse_bool(value, option.name)
    if kind is str or not isinstance(value, str):
        return value if kind is not str else str(value)
    try:
        return kind(value)
    except ValueError as error:
        raise OptionError(f"{option.name}: {value!r} is not {_KIND_NAMES[kind]}") from error


def options_from(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """An instance of `cls` (SamplingParams or EngineOptions) from loosely typed `values`.

    Raises OptionError for a name that is not an option, with the nearest one that is; `where` ends the message.
    """
    known = {option.name: option for option in fields(cls)}
    parsed = {}
    for name, value in values.items():
        if name not in known:
            raise OptionError(f"unknown option {name!r}{where}{nearest(name, known)}")
        parsed[name] = parse_option(known[name], value)
    return cls(**parsed)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: "; did you mean …?" for the known word nearest to `word`, or what is known."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(words))}" if len(words) <= 20 else ""


GREEDY = SamplingParams(
    min_new_tokens=0,
    do_sample=False,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    ignore_eos=False,
    skip_special_tokens=True,
    n=1,
    num_beams=1,
    length_penalty=1.0,
    early_stopping=False,
)
"""What holds where neither the caller nor the folder says anything."""
