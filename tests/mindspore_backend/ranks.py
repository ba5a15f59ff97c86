"""One rank under msrun. `ranks.py MODE WORK.json RESULT.json`: rank 0 writes what comes of all that WORK lists."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.device_mindspore import MindSporeDevice, adopt_msrun
from glm4.engine.step import RequestStep, StepPlan
from glm4.model.configuration_glm4 import Glm4Config
from glm4.options import GREEDY


def read(device: MindSporeDevice, path: str, texts: list[list[int]]) -> list[Any]:
    """For each text its logits, and the tokens picked at the end of each step.

    A step takes five tokens of the first text, and one of the second.
    """
    from glm4.engine.mindspore_runner import MindSporeRunner

    folder = ModelFolder.open(path)
    config = Glm4Config.from_dict(folder.read_json("config.json"))
    runner = MindSporeRunner(Checkpoint.open(folder), config, device, "float32", 16, 4, [])
    found: list[Any] = [{"logits": [], "picked": []} for _ in texts]
    done = [0] * len(texts)
    while any(left := [text[start:] for text, start in zip(texts, done, strict=True)]):
        steps = []
        for i, rest in enumerate(left):
            chunk = rest[: 1 if i else 5]
            blocks = list(range(8 * i, 8 * i + 8))
            sampling = None if done[i] else GREEDY
            if chunk:
                steps.append(RequestStep(
                    i, chunk, done[i], blocks, [len(chunk) - 1], raw_logits_at=list(range(len(chunk))),
                    sampling=sampling,
                ))  # fmt: skip
        results = runner.execute(StepPlan(steps)).results
        for step in steps:
            done[step.request_id] += len(step.token_ids)
            if device.rank == 0:
                found[step.request_id]["logits"] += results[step.request_id].logits.tolist()
                found[step.request_id]["picked"] += results[step.request_id].token_ids
    return found


if __name__ == "__main__":
    adopt_msrun()
    mode, work, result = sys.argv[1:]
    device = MindSporeDevice.open(graph=mode == "graph", size=2)
    found = {path: read(device, path, texts) for path, texts in json.loads(Path(work).read_text()).items()}
    if device.rank == 0:
        Path(result).write_text(json.dumps(found))
