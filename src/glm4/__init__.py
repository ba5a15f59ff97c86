"""Run GLM-4-0414 from a Hugging Face folder.

    from glm4 import LLM, SamplingParams

    llm = LLM("/path/hf_dir")
    [answer] = llm.chat([{"role": "user", "content": "请介绍一下北京"}])
    print(answer.text)

Names are loaded when they are first used, so that importing the package loads no tensor library.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm4.engine.async_llm import AsyncLLM as AsyncLLM
    from glm4.engine.llm import LLM as LLM
    from glm4.engine.request import RequestOutput as RequestOutput
    from glm4.errors import Glm4Error as Glm4Error
    from glm4.options import SamplingParams as SamplingParams

# Threads that wait for each other by spinning make one another late wherever something else uses the cores, too: a
# hundred times slower with one busy neighbour. This counts until torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# oneDNN and torch each keep the code of 1,024 products, one for each number of rows, of 100 KB: a hundred megabytes
# that a server fills within hours. 64 hold those that recur (see ops.linear).
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")

__version__ = "0.1.0"

_HOMES = {
    "AsyncLLM": "glm4.engine.async_llm",
    "LLM": "glm4.engine.llm",
    "RequestOutput": "glm4.engine.request",
    "SamplingParams": "glm4.options",
    "Glm4Error": "glm4.errors",
}
__all__ = ["LLM", "AsyncLLM", "Glm4Error", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glm4' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
