"""Options: ranges, spellings, and how what a caller says meets what a folder says."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4.errors import OptionError
from glm4.options import GREEDY, EngineOptions, SamplingParams, options_from, parse_memory


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (SamplingParams, {"temprature": 1}, "unknown option 'temprature'; did you mean 'temperature'?"),
        (SamplingParams, {"temperature": "warm"}, "temperature: 'warm' is not a number"),
        (SamplingParams, {"temperature": -0.1}, "temperature: -0.1 is out of range (at least 0, at most 100)"),
        (SamplingParams, {"temperature": float("nan")}, "temperature: nan is out of range (at least 0, at most 100)"),
        (SamplingParams, {"top_p": 0}, "top_p: 0 is out of range (above 0, at most 1)"),
        (SamplingParams, {"top_k": 1.5}, "top_k: 1.5 is not a whole number"),
        (SamplingParams, {"max_new_tokens": 0}, "max_new_tokens: 0 is out of range (at least 1, at most 2147483647)"),
        (SamplingParams, {"max_new_tokens": True}, "max_new_tokens: True is not a whole number"),
        (SamplingParams, {"do_sample": "perhaps"}, "do_sample: 'perhaps' is neither True nor False"),
        (SamplingParams, {"logprobs": 21}, "logprobs: 21 is out of range (at least 0, at most 20)"),
        (SamplingParams, {"stop": ["a", ""]}, "stop: an empty text would end every answer at once; leave it out"),
        (
            SamplingParams,
            {"do_sample": True, "temperature": 0},
            "temperature 0 means greedy: raise it, or set do_sample to false",
        ),
        (
            SamplingParams,
            {"min_new_tokens": 9, "max_new_tokens": 8},
            "min_new_tokens 9 is above max_new_tokens 8: lower one or raise the other",
        ),
        (SamplingParams, {"n": 3, "best_of": 2}, "best_of 2 is below n 3: draw at least as many as are kept"),
        (
            SamplingParams,
            {"logit_bias": "[1]"},
            "logit_bias: '[1]' is no object of token ids and numbers: write it like {\"123\": -5}",
        ),
        (SamplingParams, {"temperature": "inf"}, "temperature: inf is not a finite number"),
        (
            EngineOptions,
            {"max_device_memory": "59"},
            "max_device_memory: '59' is not an amount of memory: write it like 59GB, 800MB or 80% (of what is free)",
        ),
        (EngineOptions, {"device": "gpu"}, "device: 'gpu' is none of auto, cpu, cuda, npu"),
        (
            EngineOptions,
            {"dtype": "float16"},
            "dtype float16: GLM-4 overflows in it and answers '!!!!'; use bfloat16 or float32",
        ),
        (
            EngineOptions,
            {"max_device_memory": "much"},
            "max_device_memory: 'much' is not an amount of memory: write it like 59GB, 800MB or 80% (of what is free)",
        ),
        (
            EngineOptions,
            {"max_device_memory": 59.5},
            "max_device_memory: 59.5 is not an amount of memory: write it like 59GB, 800MB or 80% (of what is free)",
        ),
        (
            EngineOptions,
            {"max_device_memory": "150%"},
            "max_device_memory: '150%' is not a share of the free memory: it is above 0% and at most 100%",
        ),
        (
            EngineOptions,
            {"kv_cache_dtype": "int4"},
            "kv_cache_dtype: 'int4' is none of auto, bfloat16, float32, int8",
        ),
        (EngineOptions, {"block_size": 0}, "block_size: 0 is out of range (at least 1, at most 1024)"),
    ],
)
def test_bad_values_are_named(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        options_from(cls, values)
    assert str(caught.value) == message


def test_texts_become_values() -> None:
    values = {"temperature": "0.6", "top_k": "40", "do_sample": "TRUE", "stop": ["。", "\n"], "max_new_tokens": "none"}
    expected = SamplingParams(temperature=0.6, top_k=40, do_sample=True, stop=("。", "\n"))
    assert options_from(SamplingParams, values) == expected
    options = options_from(EngineOptions, {"max_device_memory": "1.5GB", "max_model_len": "64"})
    assert options == EngineOptions(max_device_memory=3 * 2**29, max_model_len=64)
    assert options_from(EngineOptions, {"max_device_memory": "80%"}) == EngineOptions(max_device_memory=0.8)
    assert SamplingParams(stop="。").stop == ("。",)


@pytest.mark.parametrize(
    ("text", "size"),
    [("59GB", 59 * 2**30), ("800 mb", 800 * 2**20), ("2GiB", 2**31), ("5k", 5120), (77, 77), ("8B", 8)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_memory(text) == size
    assert isinstance(parse_memory(text), int)


@pytest.mark.parametrize(
    ("value", "share"), [("80%", 0.8), (" 12.5 % ", 0.125), ("0.8", 0.8), (0.8, 0.8), (1.0, 1.0), ("100%", 1.0)]
)
def test_shares_of_what_is_free(value: str | float, share: float) -> None:
    assert parse_memory(value) == share
    assert isinstance(parse_memory(value), float)


@given(st.one_of(st.text(max_size=30), st.integers(), st.floats(), st.booleans(), st.none()))
def test_any_size_is_a_number_or_an_option_error(value: Any) -> None:
    try:
        assert parse_memory(value) > 0
    except OptionError as error:
        assert "\n" not in str(error) or "\n" in str(value)


FOLDER = SamplingParams(do_sample=True, temperature=0.6, top_p=0.95, max_new_tokens=500).over(GREEDY)


@pytest.mark.parametrize(
    ("said", "folder", "expected"),
    [
        # nobody says anything: greedy
        ({}, GREEDY, {"do_sample": False}),
        # the folder decides
        ({}, FOLDER, {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 500}),
        # naming a knob means sampling
        ({"temperature": 0.7}, GREEDY, {"do_sample": True, "temperature": 0.7}),
        ({"top_k": 5}, GREEDY, {"do_sample": True, "temperature": 1.0, "top_k": 5}),
        # … and 0 means greedy, whatever the folder says
        ({"temperature": 0.0}, FOLDER, {"do_sample": False, "max_new_tokens": 500}),
        ({"do_sample": False}, FOLDER, {"do_sample": False}),
        # one knob of the folder's changed, the others kept
        ({"top_p": 0.5}, FOLDER, {"do_sample": True, "temperature": 0.6, "top_p": 0.5}),
    ],
)
def test_what_the_caller_says_counts_more(
    said: dict[str, Any], folder: SamplingParams, expected: dict[str, Any]
) -> None:
    params = SamplingParams(**said).over(folder)
    for name, value in expected.items():
        assert getattr(params, name) == value, name
    may_be_open = (
        "max_new_tokens",
        "seed",
        "logprobs",
        "prompt_logprobs",
        "best_of",
        "json_schema",
        "regex",
        "grammar",
        "temperature" if not params.do_sample else "",
    )
    assert all(getattr(params, f.name) is not None for f in fields(params) if f.name not in may_be_open)


def test_every_option_has_its_line_of_help() -> None:
    for option in (*fields(SamplingParams), *fields(EngineOptions)):
        assert option.metadata["help"], option.name
