"""The demo model's folders on disk: tokenizer, configs, shards, model cards, in the official layout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
EOS_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
# How GLM-4 cuts text before BPE: contractions, words, up to three digits, punctuation, line ends, other space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries, the special tokens after them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # bytes: four Chinese characters, so that phrases stay made of words
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, **flags, "special": True} for token in SPECIAL_TOKENS
    }
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|user|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizer",
    }
    end = {"content": "<|endoftext|>", **flags}
    special = {"additional_special_tokens": list(SPECIAL_TOKENS), "eos_token": end, "pad_token": end}
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


def write_configs(folder: Path, tokenizer: Tokenizer, shape: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, which is returned, and generation_config.json; `shape` holds the sizes."""
    ends = {
        "eos_token_id": [tokenizer.token_to_id(token) for token in EOS_TOKENS],
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    config = {
        "architectures": ["Glm4ForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "model_type": "glm4",
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0.dev0",
        "use_cache": True,
        # padded beyond the tokenizer, as the official one is: those ids must never be sampled
        "vocab_size": (tokenizer.get_vocab_size() // 64 + 1) * 64,
        **ends,
        **shape,
    }
    config = dict(sorted(config.items()))
    write_json(folder / "config.json", config)
    generation = {"_from_model_config": True, **ends, "transformers_version": config["transformers_version"]}
    write_json(folder / "generation_config.json", generation)
    return config


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """`weights` as two bfloat16 shards of about equal size, and their index."""
    tensors = {name: weights[name].to(torch.bfloat16).contiguous() for name in sorted(weights, key=_layer_order)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    written = 0
    for name, tensor in tensors.items():
        shards[written * 2 >= total][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors leaves it to its owner alone
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _layer_order(name: str) -> tuple[int, str]:
    """Embeddings first, then the layers in order, then the final norm and the head."""
    parts = name.split(".")
    if "layers" in parts:
        return int(parts[parts.index("layers") + 1]) + 1, name
    return (0 if "embed_tokens" in parts else 10_000), name


def link_folder(folder: Path, target: Path, own: Iterable[str]) -> None:
    """Make `folder` the same model as `target` through relative links, but for the files named in `own`."""
    for file in sorted(target.iterdir()):
        link = folder / file.name
        if file.name not in own:
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..") / target.name / file.name)


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
