from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from glm4.errors import CheckpointError, ConfigError, PromptError
from glm4.text.tokenizer import Tokenizer

TEXTS = [
    "",
    "请介绍一下北京",
    "Hello,  world!\n\n\tIndented   ",
    "def f(x):\n    return {'a': x ** 2}\n",
    "👩‍👩‍👧‍👦 naïve café \u200b \x00 \ufffd",
    " " * 300 + "x" + "\n" * 40,
    "[gMASK]<sop><|user|>\n你好<|assistant|>",
    "<|user|><|user|>x[MASK]y<think>z</think>",
]


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.mark.parametrize("text", TEXTS)
def test_encode_equals_transformers(official: Tokenizer, oracle: Any, text: str) -> None:
    assert official.encode(text) == oracle.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_plain_equals_transformers_without_added_tokens(official: Tokenizer, oracle: Any, text: str) -> None:
    assert official.encode_plain(text) == oracle.encode(text, add_special_tokens=False, split_special_tokens=True)


@given(ids=st.lists(st.integers(0, 151_600), max_size=30), skip=st.booleans())
def test_decode_equals_transformers(official: Tokenizer, oracle: Any, ids: list[int], skip: bool) -> None:
    assert official.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


@given(text=st.text())
def test_text_survives_the_way_there_and_back(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode_plain(text)) == text
    assert not set(small.encode_plain(text)) & set(small.special_tokens.values())


@given(data=st.data())
def test_decode_equals_the_library_on_any_ids(
    small: Tokenizer, small_backend: tokenizers.Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, small.vocab_size + 5)))
    for skip in (True, False):
        assert small.decode(ids, skip) == small_backend.decode(ids, skip_special_tokens=skip)


def test_numbers_of_the_official_vocabulary(official: Tokenizer) -> None:
    assert official.vocab_size == 151_343
    assert official.unknown_ids(151_552) == list(range(151_343, 151_552))
    assert len(official.special_tokens) == 14
    assert official.special_tokens["<|observation|>"] == 151_338


def test_holes_in_the_vocabulary_are_unknown_ids() -> None:
    tokenizer = Tokenizer(byte_level({"a": 0, "b": 3}, []))
    assert tokenizer.vocab_size == 4
    assert tokenizer.unknown_ids(6) == [1, 2, 4, 5]
    assert tokenizer.decode([0, 1, 3, 5]) == "ab"


def test_threads_share_one_tokenizer(official: Tokenizer) -> None:
    text = "x<|user|>你好[gMASK]" * 50
    marked, plain = official.encode(text), official.encode_plain(text)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(official.encode if i % 2 else official.encode_plain, text) for i in range(40)]
    assert [job.result() for job in jobs] == [plain, marked] * 20


@pytest.mark.parametrize("text", ["\ud800", "ab\udfff", "😀"[:1] + "\ud83d"])
def test_lone_surrogates_are_refused(small: Tokenizer, text: str) -> None:
    for encode in (small.encode, small.encode_plain):
        with pytest.raises(PromptError, match=rf"not valid Unicode: character {len(text) - 1} .* U\+D"):
            encode(text)


def test_saved_truncation_and_padding_do_not_touch_a_prompt(small_backend: tokenizers.Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(small_backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: fetch it"),
        (b"", "is not a whole tokenizer"),
        (b'{"version": "1.0", "model": {"type"', "is not a whole tokenizer"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "is not a byte-level BPE"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: Is a directory"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"added_tokens_decoder": {"x": {"content": "<a>"}}}', "added_tokens_decoder is malformed"),
        ('{"added_tokens_decoder": {"5": "<a>"}}', "added_tokens_decoder is malformed"),
        ('{"added_tokens_decoder": {"5": {"content": "<|user|>", "special": true}}}', "'<|user|>' has id 5 here and"),
    ],
)
def test_an_unusable_tokenizer_config_is_named(small_folder: Path, tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((small_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "tokenizer_config.json") in str(caught.value)


def test_tokens_that_only_tokenizer_config_names_are_added(
    small: Tokenizer, small_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((small_folder / "tokenizer.json").read_bytes())
    added = {str(small.vocab_size): {"content": "<new>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")

    tokenizer = Tokenizer.from_folder(tmp_path)

    assert tokenizer.special_tokens == small.special_tokens | {"<new>": small.vocab_size}
    assert tokenizer.encode("<new>") == [small.vocab_size]
    assert tokenizer.decode(tokenizer.encode_plain("<new>")) == "<new>"


def test_a_vocabulary_that_spells_a_control_token_is_refused() -> None:
    backend = byte_level({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    backend.add_special_tokens(["ab"])
    with pytest.raises(CheckpointError, match="plain text can spell the control token 'ab'"):
        Tokenizer(backend).encode_plain("ab")


def test_the_text_floor_needs_no_tensor_library() -> None:
    program = """
import importlib, pkgutil, sys
for name in ("torch", "numpy", "transformers"):
    sys.modules[name] = None
import glm4.text
names = [module.name for module in pkgutil.walk_packages(glm4.text.__path__, "glm4.text.")]
for name in names:
    importlib.import_module(name)
print(*sorted(names))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"glm4.text.chat", "glm4.text.sandbox", "glm4.text.tokenizer"} <= set(done.stdout.split())
