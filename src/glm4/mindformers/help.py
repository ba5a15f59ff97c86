"""The text of `run_mindformer.py --help`, derived from the table of keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from glm4.mindformers.keys import KEYS, OPTION_GROUPS, Key

_USAGE = """\
Answer prompts with a GLM-4-0414 model, from the command line of MindSpore Transformers.

  python run_mindformer.py --config configs/glm4/predict_glm4.yaml --pretrained_model_dir /path/hf_dir \\
      --predict_data '请介绍一下北京'
  python run_mindformer.py --config configs/glm4/predict_glm4.yaml --predict_data prompts.txt \\
      --predict_batch_size 4 --generation_config.max_new_tokens 200
  bash scripts/msrun_launcher.sh "run_mindformer.py --config configs/glm4/predict_glm4.yaml --use_parallel True \\
      --parallel_config.model_parallel 2 --predict_data '请介绍一下北京'" 2

A value is taken from the flag, else from the YAML file, else from the model folder and the defaults. Every key
below can stand in the YAML file (dots are indentation), and on the command line as --KEY VALUE, as --KEY=VALUE,
or in --options KEY=VALUE …

  --config FILE                YAML file, looked for here and then beside run_mindformer.py
  --options KEY=VALUE …        any keys
  --debug                      show the traceback of an error
"""
_JOB_HELP = {
    "run_mode": "predict",
    "predict_data": "one or more prompts, or a file: one prompt a line; \\n is a newline",
    "batch_size": "prompts side by side; divides their number (1)",
    "use_chat_template": "False feeds the raw text (True where the folder has one)",
    "output_dir": "folder of the log (./output)",
    "pretrained_model_dir": "the Hugging Face folder of the model",
    "load_checkpoint": "the same folder, or nothing",
    "use_parallel": "True where a degree below is above 1 (False)",
}


def help_text() -> str:
    """All keys: what they mean, or why they change nothing."""
    honoured = [(_name(key), _meaning(key)) for key in KEYS if key.sets]
    ignored = [(_name(key), key.ignored) for key in KEYS if key.ignored]
    refused = [(_name(key), key.refused) for key in KEYS if key.refused]
    return (
        f"{_USAGE}\n{_table(honoured)}\n\nKnown, and ignored with a line that says so:\n\n{_table(ignored)}"
        f"\n\nKnown, and refused:\n\n{_table(refused)}"
    )


def _name(key: Key) -> str:
    return f"--{key.path}" + (f", --{key.flag}" if key.flag else "")


def _meaning(key: Key) -> str:
    group, _, name = key.sets.partition(".")
    if key.choices:
        return ", ".join(key.choices)
    if group not in OPTION_GROUPS:
        return _JOB_HELP[name]
    option = next(option for option in fields(OPTION_GROUPS[group]) if option.name == name)
    return str(option.metadata["help"])


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<50} {meaning}" for name, meaning in rows)
