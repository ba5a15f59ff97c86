"""Jobs from a YAML text and flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm4.errors import OptionError
from glm4.mindformers.config import PredictJob, read_job

REPOSITORY = Path(__file__).resolve().parents[2]


def job(*flags: str, text: str = "seed: 7\n", environment: dict[str, str] | None = None) -> PredictJob:
    """The job of a YAML with `text` and these flags, with a prompt and a model where none is given."""
    Path("job.yaml").write_text(text, encoding="utf-8")
    if not any("predict_data" in word for word in flags) and not text.startswith("predict_data"):
        flags += ("--predict_data", "你好")
    if not any(name in word for word in (*flags, text) for name in ("pretrained_model_dir", "load_checkpoint")):
        flags += ("--pretrained_model_dir", "model")
    return read_job(["--config", "job.yaml", *flags], environment=environment or {})


def refusal(*flags: str, text: str = "seed: 7\n", environment: dict[str, str] | None = None) -> str:
    with pytest.raises(OptionError) as caught:
        job(*flags, text=text, environment=environment)
    message = str(caught.value)
    assert "\n" not in message
    return message
