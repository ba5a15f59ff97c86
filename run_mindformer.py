"""Answer prompts with a GLM-4-0414 model: `python run_mindformer.py --help`.

用 MindSpore Transformers 的命令行方式运行 GLM-4-0414 推理。
"""

import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent

if __name__ == "__main__":
    if find_spec("glm4") is None:
        sys.path.insert(0, str(REPOSITORY / "src"))
    from glm4.mindformers.run import main

    sys.exit(main(sys.argv[1:], REPOSITORY))
