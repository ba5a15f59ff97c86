"""One official tokenizer and one oracle for all text tests, and a small tokenizer for those that need no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from glm4.text.tokenizer import Tokenizer

CONTROL_TOKENS = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog\n\n",
    "请介绍一下北京，北京是中国的首都。",
    "def f(x):\n    return x",
]
CHECKPOINTS = ["GLM-4-9B-0414", "GLM-4-32B-0414", "GLM-Z1-9B-0414", "GLM-Z1-32B-0414", "GLM-Z1-Rumination-32B-0414"]


@pytest.fixture(scope="session")
def small_backend() -> tokenizers.Tokenizer:
    """A byte-level BPE of all 256 bytes and a few merges."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens(CONTROL_TOKENS)
    return backend


@pytest.fixture(scope="session")
def small_folder(small_backend: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small_backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def small(small_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(small_folder)


@pytest.fixture(scope="session")
def official(official_9b: Path) -> Tokenizer:
    return Tokenizer.from_folder(official_9b)


@pytest.fixture(scope="session")
def oracle(official_9b: Path) -> Any:
    """transformers' own tokenizer over the same file."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(official_9b / "tokenizer.json"))


@pytest.fixture(scope="session", params=CHECKPOINTS)
def template_folder(request: pytest.FixtureRequest, shared: Path) -> Path:
    """Each folder of the family, for its chat template."""
    return shared / "glm4-0414" / request.param
