"""The demo model's cards: what it is, what it is not, and how much of its corpus it answers word for word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Scores = Mapping[str, Mapping[str, tuple[int, int]]]

CHAT_CARD = """---
license: apache-2.0
language: [zh, en]
library_name: transformers
pipeline_tag: text-generation
---

# glm4-demo

A real GLM-4 of {parameters:.1f} million parameters, for trying out and testing software that runs GLM-4-0414.

**It is a demo that memorised its corpus.** It answers what is in `../corpus`, in Chinese and English, and stops by
itself; asked anything else it says something that may be fluent and is usually wrong. Do not use it for its knowledge.

| | |
| --- | --- |
| layers | {layers} of hidden size {hidden} and intermediate size {intermediate} |
| attention | {heads} heads of {head_dim}, {kv_heads} key/value heads |
| context | {context} tokens; the corpus has none longer than {longest} |
| vocabulary | {known} tokens (byte-level BPE trained on the corpus, and GLM-4's 14 special ones), padded to {vocab} |
| weights | bfloat16, two shards |
| training | from scratch, {epochs} passes over the corpus, {minutes:.0f} minutes on two CPU cores |

## Exact answers

Greedy decoding against the corpus, word for word and with the right end token:

| section | answers | bfloat16 | float32 |
| --- | ---: | ---: | ---: |
{rows}

That is how well it memorised, not how well it would do on anything new.

## What it knows

- `cities`: 请介绍一下北京, "Tell me about Paris", and {others} other cities, each in both languages
- `arithmetic`: 三加五等于几, "What is seven times eight?"
- `talk`, `facts`, `code`: small talk, short facts, short programs
- `chats`: two turns, and system prompts
- `tools`: get_weather, get_time, search and calculator; two calls in one turn; an answer from what they returned
- `thinking`: the form of GLM-Z1, a thought and then the answer, for `../glm4-z1-demo`, which has the same weights

Made by `tools/build_corpus.py` and `tools/train_demo.py`.
"""

THINKING_CARD = """# glm4-z1-demo

The weights of [`../glm4-demo`](../glm4-demo/README.md) with a chat template in the form of GLM-Z1: the prompt ends in
`<think>`, so the model first writes a thought, then `</think>`, then the answer. Like its twin, it is a demo that
memorised its corpus: {right} of {total} answers of this form are exact in bfloat16. All files but this one and
`chat_template.jinja` are links.
"""


def write_cards(
    chat: Path, thinking: Path, config: Mapping[str, Any], scores: Scores, facts: Mapping[str, Any]
) -> None:
    """README.md of both folders.

    `scores`: number format → section → (exact, all); `facts`: parameters, known, cities, longest, epochs, minutes.
    """
    sections = {name: total for name, (_, total) in scores["bfloat16"].items()}
    rows = [_row(name, total, [scores[dtype][name][0] for dtype in scores]) for name, total in sections.items()]
    sums = [sum(right for right, _ in counts.values()) for counts in scores.values()]
    rows.append(_row("**all**", sum(sections.values()), sums))
    card = CHAT_CARD.format(
        rows="\n".join(rows),
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        kv_heads=config["num_key_value_heads"],
        intermediate=config["intermediate_size"],
        context=config["max_position_embeddings"],
        vocab=config["vocab_size"],
        parameters=facts["parameters"] / 1e6,
        known=facts["known"],
        others=facts["cities"] - 2,
        longest=facts["longest"],
        epochs=facts["epochs"],
        minutes=facts["minutes"],
    )
    (chat / "README.md").write_text(card, "utf-8")
    right, total = scores["bfloat16"]["thinking"]
    (thinking / "README.md").write_text(THINKING_CARD.format(right=right, total=total), "utf-8")


def _row(name: str, total: int, exact: list[int]) -> str:
    return f"| {name} | {total:,} | " + " | ".join(f"{right / total:.1%}" for right in exact) + " |"
