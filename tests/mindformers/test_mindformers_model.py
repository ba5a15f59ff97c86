"""The whole program on a tiny random model with the official tokenizer and template, against transformers."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import TinyCheckpoint, write_tiny

from glm4.mindformers.run import main

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = ["请介绍一下北京", "1 + 1 = ?"]
TOKENS = 8


@pytest.fixture(scope="module")
def tiny(official_9b: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """A small model over the official vocabulary."""
    path = tmp_path_factory.mktemp("official_vocabulary")
    ends = [151329, 151336, 151338]
    checkpoint = write_tiny(path, vocab_size=151552, sharded=False, pad_token_id=151329, eos_token_id=ends)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(official_9b / name, path / name)
    return checkpoint


@pytest.fixture(scope="module")
def tokenizer(tiny: TinyCheckpoint) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny.path)


def reference(tiny: TinyCheckpoint, tokenizer: Any, prompt: str) -> str:
    """transformers' greedy continuation; ids that are no token of the vocabulary are masked, as we do."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    unknown = list(range(len(tokenizer), tiny.theirs.config.vocab_size))
    out = tiny.theirs.generate(ids, max_new_tokens=TOKENS, do_sample=False, suppress_tokens=unknown)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("template", [True, False])
def test_answers_equal_those_of_transformers(
    tiny: TinyCheckpoint, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {
        "config": "configs/glm4/predict_glm4.yaml",
        "use_parallel": "False",
        "pretrained_model_dir": str(tiny.path),
        "use_chat_template": str(template),
        "predict_batch_size": "2",
        "generation_config.max_new_tokens": str(TOKENS),
        "model.model_config.compute_dtype": "float32",
        "device_target": "CPU",
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert main([*argv, "--predict_data", *PROMPTS], REPOSITORY) == 0
    [batch] = ast.literal_eval(Path("text_generation_result.txt").read_text("utf-8"))
    fed = PROMPTS
    if template:
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        fed = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    assert batch["text_generation_text"] == [reference(tiny, tokenizer, prompt) for prompt in fed]
