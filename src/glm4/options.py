"""Every option once: its name, type, default and one line of help.

The command line, the YAML files, the Python API and the docs derive from these two frozen dataclasses.
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

DEVICES = ("auto", "cpu", "cuda", "npu")
DTYPES = ("auto", "bfloat16", "float32")


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


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is continued.

    Greedy unless the caller, or the folder's generation_config.json, says otherwise: a temperature of 0 is
    greedy, and naming any of temperature, top_k, top_p or min_p means sampling.

    Raises OptionError when a value is outside its range.
    """

    max_new_tokens: int | None = _option(None, "tokens to generate at most; none: until the model stops", low=1)
    min_new_tokens: int | None = _option(None, "tokens to generate before the model may stop", low=0)
    do_sample: bool | None = _option(None, "draw tokens at random instead of taking the likeliest")
    temperature: float | None = _option(None, "flatten (above 1) or sharpen (below 1) the distribution", low=0.0)
    top_k: int | None = _option(None, "sample among the k likeliest tokens; 0: all", low=0)
    top_p: float | None = _option(
        None, "sample among the likeliest tokens that hold this probability", above=0.0, high=1.0
    )
    min_p: float | None = _option(
        None, "drop tokens below this share of the likeliest one's probability", low=0.0, high=1.0
    )
    repetition_penalty: float | None = _option(None, "above 1: make tokens already seen less likely", above=0.0)
    presence_penalty: float | None = _option(
        None, "subtracted once from every token already generated", low=-2.0, high=2.0
    )
    frequency_penalty: float | None = _option(
        None, "subtracted for each time a token was generated", low=-2.0, high=2.0
    )
    stop: tuple[str, ...] = _option((), "texts that end the answer (they are not part of it)")
    stop_token_ids: tuple[int, ...] = _option((), "token ids that end the answer, beside the folder's own", low=0)
    ignore_eos: bool | None = _option(None, "go on past the model's own end of answer")
    seed: int | None = _option(None, "same seed, same words, whatever else runs beside it", low=0)
    logit_bias: tuple[tuple[int, float], ...] = _option(
        (), 'added to the logits of these token ids, as JSON: {"123": -5}', parse=_parse_logit_bias
    )
    n: int | None = _option(None, "answers to one prompt", low=1, high=128)
    best_of: int | None = _option(None, "answers to draw, of which the n likeliest are kept", low=1, high=128)
    prompt_logprobs: int | None = _option(
        None, "log-probabilities of this many likeliest tokens at each position of the prompt", low=0, high=20
    )
    logprobs: int | None = _option(None, "log-probabilities of this many likeliest tokens at each step", low=0, high=20)
    skip_special_tokens: bool | None = _option(None, "leave control tokens out of the text")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.logit_bias, tuple):
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
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise OptionError(f"best_of {self.best_of} is below n {self.n or 1}: draw at least as many as are kept")

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


def parse_size(value: str | int) -> int:
    """Bytes in `value`: "59GB" (2**30 each, as MindSpore counts) or "800MB"; a whole number, not a text, is bytes.

    Raises OptionError for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*(?:([KMGT])I?B?|B)\s*", str(value), re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** " KMGT".index((match[2] or " ").upper())) if match else 0
    if size <= 0:
        raise OptionError(f"{value!r} is not an amount of memory: write it like 59GB or 800MB")
    return size


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine is built from: the folder, the device and its limits.

    Raises OptionError when a value is outside its range.
    """

    model: str = _option("", "the Hugging Face folder of the model")
    device: str = _option("auto", "where to run", choices=DEVICES)
    device_id: int = _option(0, "which of the machine's cards, counted from 0", low=0)
    dtype: str = _option("auto", "number format of the weights and the arithmetic", choices=DTYPES)
    max_device_memory: int | None = _option(
        None, "use at most this much memory, such as 59GB; none: what is free", parse=parse_size
    )
    max_model_len: int | None = _option(None, "longest prompt plus answer; none: the model's own limit", low=1)
    max_batch_tokens: int = _option(2048, "tokens computed in one step at most", low=1)
    max_batch_requests: int = _option(64, "requests running side by side at most", low=1)
    block_size: int = _option(16, "tokens in one block of the KV cache", low=1)
    speculative_tokens: int = _option(
        0, "tokens to guess in each step from what the text said before; answers stay the same; 0: none", low=0, high=16
    )
    prefix_caching: bool = _option(True, "let prompts that begin alike share what was computed for one of them")
    threads: int | None = _option(None, "CPU threads; none: one for each core", low=1)
    seed: int | None = _option(None, "seed of requests that bring none of their own", low=0)

    def __post_init__(self) -> None:
        if self.dtype == "float16":
            raise OptionError("dtype float16: GLM-4 overflows in it and answers '!!!!'; use bfloat16 or float32")
        if isinstance(self.max_device_memory, str):
            object.__setattr__(self, "max_device_memory", parse_size(self.max_device_memory))
        _check_ranges(self)


def _check_ranges(options: SamplingParams | EngineOptions) -> None:
    for option in fields(options):
        value, limits = getattr(options, option.name), option.metadata
        if value is None:
            continue
        if "choices" in limits and value not in limits["choices"]:
            raise OptionError(f"{option.name}: {value!r} is none of {', '.join(limits['choices'])}")
        if option.name == "logit_bias":  # checked where it is parsed
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
    parts = [
        f"above {above:g}" if above is not None else "",
        f"at least {low:g}" if low is not None else "",
        f"at most {high:g}" if high is not None else "",
    ]
    return ", ".join(part for part in parts if part)


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
)
"""What holds where neither the caller nor the folder says anything."""
