"""Tiny random checkpoints, written by transformers itself, so that what we read is what others write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

SHAPES: dict[str, dict[str, Any]] = {
    "biases, 2 KV heads": {"attention_bias": True, "num_attention_heads": 4, "num_key_value_heads": 2},
    "no biases, 8 KV heads": {"attention_bias": False, "num_attention_heads": 8, "num_key_value_heads": 8},
    "odd head counts": {"attention_bias": True, "num_attention_heads": 5, "num_key_value_heads": 1},
    "tied": {"attention_bias": False, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "yarn": {"attention_bias": True, "num_attention_heads": 6, "num_key_value_heads": 2, "yarn": True},
}


@dataclass(frozen=True)
class TinyCheckpoint:
    """A folder and the transformers model it was written from."""

    path: Path
    theirs: transformers.Glm4ForCausalLM


def write_tiny(path: Path, vocab_size: int = 320, seed: int = 0, sharded: bool = True, **shape: Any) -> TinyCheckpoint:
    """A 3-layer model of the given shape in float32, weights wide enough that its tokens vary."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if shape.pop("yarn", False):
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": rope,
        "pad_token_id": 0,
        "eos_token_id": [1, 2, 3],
    } | shape
    torch.manual_seed(seed)
    theirs = transformers.Glm4ForCausalLM(transformers.Glm4Config(**settings)).float().eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name.endswith("bias") or weight.dim() > 1:
                weight.normal_(0, 0.1)
            else:
                weight.uniform_(0.5, 1.5)
    theirs.save_pretrained(path, max_shard_size="200KB" if sharded else "1GB")
    return TinyCheckpoint(path, theirs)


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of ... removes the key."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


CONTROL_TOKENS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}<|assistant|>"
)


def write_tiny_chat(path: Path, **shape: Any) -> TinyCheckpoint:
    """A tiny model that one can talk to: a tokenizer of single bytes, GLM-4's control tokens and its chat format.

    What it says is noise, the same every time.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL_TOKENS))
    ends = [backend.token_to_id(token) for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    tiny = write_tiny(path, eos_token_id=ends, **shape)
    backend.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tiny


class Reference:
    """What a tiny model answers, by transformers and tokenizers alone."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = transformers.Glm4ForCausalLM.from_pretrained(folder)

    def count(self, prompt: str) -> int:
        """Tokens of a rendered prompt."""
        return len(self.tokenizer.encode(prompt).ids)

    def answer(self, prompt: str, max_new_tokens: int) -> str:
        """The greedy continuation of a rendered prompt, the ids without a token left out."""
        ids = self.tokenizer.encode(prompt).ids
        known = self.tokenizer.get_vocab_size()
        output = self.model.generate(
            torch.tensor([ids]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            suppress_tokens=list(range(known, self.model.config.vocab_size)),
        )
        return self.tokenizer.decode(output[0, len(ids) :].tolist()).removeprefix("\n")
