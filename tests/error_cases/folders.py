"""Model folders and the files in them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import torch
from error_cases.table import case
from programs import Bench, Ran
from torch import Tensor

SHARD = "model-00001-of-00003.safetensors"
NORM = "model.layers.0.input_layernorm.weight"


@case("no folder is named")
def _(bench: Bench) -> Ran:
    return bench.glm4("generate", "hi")


@case("the folder is not there")
def _(bench: Bench) -> Ran:
    return bench.glm4("generate", "hi", "-m", "nowhere")


@case("the folder is not there (`run_mindformer.py`)")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--pretrained_model_dir", "nowhere")


@case("a name on a hub in place of a folder")
def _(bench: Bench) -> Ran:
    return bench.glm4("plan", "zai-org/GLM-4-9B-0414")


@case("a file in place of a folder")
def _(bench: Bench) -> Ran:
    return bench.glm4("chat", "-m", str(bench.model / "config.json"))


@case("no folder is named (`run_mindformer.py`)")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--pretrained_model_dir", "")


@case("`--load_checkpoint` names another folder")
def _(bench: Bench) -> Ran:
    Path("other").mkdir()
    return bench.mindformer("--load_checkpoint", "other")


@case("an empty folder")
def _(bench: Bench) -> Ran:
    shutil.rmtree(bench.model)
    bench.model.mkdir()
    return bench.both()


@case("the cache folder of `huggingface_hub`")
def _(bench: Bench) -> Ran:
    snapshot = bench.folder / "cache" / "snapshots" / "c0ffee"
    snapshot.parent.mkdir(parents=True)
    bench.model.rename(snapshot)
    bench.model = bench.folder / "cache"
    return bench.both()


@case("a download that was interrupted")
def _(bench: Bench) -> Ran:
    (bench.model / SHARD).rename(bench.model / f"{SHARD}.incomplete")
    return bench.both()


@case("a clone without Git LFS")
def _(bench: Bench) -> Ran:
    (bench.model / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    return bench.both()


@case("only `*.bin` weights")
def _(bench: Bench) -> Ran:
    for file in bench.model.glob("model*"):
        file.unlink()
    (bench.model / "pytorch_model.bin").write_bytes(b"\x80\x02")
    return bench.both()


@case("only `*.gguf` weights")
def _(bench: Bench) -> Ran:
    for file in bench.model.glob("model*"):
        file.unlink()
    (bench.model / "glm-4.gguf").write_bytes(b"GGUF")
    return bench.both()


@case("no weights at all")
def _(bench: Bench) -> Ran:
    for file in bench.model.glob("model*"):
        file.unlink()
    return bench.both()


@case("a shard is missing")
def _(bench: Bench) -> Ran:
    (bench.model / SHARD).unlink()
    return bench.both()


@case("a shard is cut off")
def _(bench: Bench) -> Ran:
    data = (bench.model / SHARD).read_bytes()
    (bench.model / SHARD).write_bytes(data[:-1000])
    return bench.both()


@case("a shard is something else")
def _(bench: Bench) -> Ran:
    (bench.model / SHARD).write_text("<html>404</html>")
    return bench.both()


@case("a shard that the index does not name")
def _(bench: Bench) -> Ran:
    shutil.copy(bench.model / SHARD, bench.model / "extra.safetensors")
    return bench.both()


@case("a tensor is missing")
def _(bench: Bench) -> Ran:
    bench.edit_shard(lambda tensors: tensors.__delitem__(NORM))
    return bench.both()


@case("a tensor too many")
def _(bench: Bench) -> Ran:
    bench.edit_shard(lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    return bench.both()


@case("a tensor of another shape")
def _(bench: Bench) -> Ran:
    bench.edit_shard(lambda tensors: tensors.update({NORM: torch.ones(3)}))
    return bench.both()


@case("float16 weights")
def _(bench: Bench) -> Ran:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors[NORM] = tensors[NORM].half()

    bench.edit_shard(halve)
    return bench.both()


@case("no `tokenizer.json`")
def _(bench: Bench) -> Ran:
    (bench.model / "tokenizer.json").unlink()
    return bench.both()


@case("`tokenizer.json` is cut off")
def _(bench: Bench) -> Ran:
    file = bench.model / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-100])
    return bench.both()


@case("`chat_template.jinja` with a syntax error")
def _(bench: Bench) -> Ran:
    (bench.model / "chat_template.jinja").write_text("{% for m in messages %}")
    return bench.both()


@case("no chat template, and `--use_chat_template True`")
def _(bench: Bench) -> Ran:
    (bench.model / "chat_template.jinja").unlink()
    return bench.mindformer("--use_chat_template", "True")


@case("no chat template, and `glm4 generate` without `--raw`")
def _(bench: Bench) -> Ran:
    (bench.model / "chat_template.jinja").unlink()
    return bench.generate()


@case("no chat template, and `glm4 chat`")
def _(bench: Bench) -> Ran:
    (bench.model / "chat_template.jinja").unlink()
    return bench.glm4("chat", "-m", str(bench.model))


@case("`generation_config.json` with a value out of range")
def _(bench: Bench) -> Ran:
    (bench.model / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_p": 7}))
    return bench.both()


@case("`config.json` is of another model")
def _(bench: Bench) -> Ran:
    bench.edit_config(architectures=["ChatGLMModel"], model_type="chatglm")
    return bench.both()


@case("`config.json` of weights quantised in a way that is not read")
def _(bench: Bench) -> Ran:
    bench.edit_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return bench.both()


@case("`config.json` of 3-bit weights")
def _(bench: Bench) -> Ran:
    bench.edit_config(quantization_config={"quant_method": "gptq", "bits": 3, "group_size": 128})
    return bench.both()


@case("`config.json` without a key")
def _(bench: Bench) -> Ran:
    bench.edit_config(head_dim=...)
    return bench.both()


@case("`config.json` with a key that is not known")
def _(bench: Bench) -> Ran:
    bench.edit_config(sliding_window=4096)
    return bench.both()


@case("`config.json` with a value of the wrong type")
def _(bench: Bench) -> Ran:
    bench.edit_config(num_hidden_layers="three")
    return bench.both()


@case("`config.json` with another activation")
def _(bench: Bench) -> Ran:
    bench.edit_config(hidden_act="gelu")
    return bench.both()


@case("`config.json` with another RoPE scaling")
def _(bench: Bench) -> Ran:
    bench.edit_config(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})
    return bench.both()


@case("`config.json` is not JSON")
def _(bench: Bench) -> Ran:
    (bench.model / "config.json").write_text('{"model_type": "glm4",}')
    return bench.both()


@case("`config.json` has a key twice")
def _(bench: Bench) -> Ran:
    (bench.model / "config.json").write_text('{"model_type": "glm4", "model_type": "glm"}')
    return bench.both()


@case("`config.json` is not UTF-8")
def _(bench: Bench) -> Ran:
    (bench.model / "config.json").write_bytes(b'{"model_type": "\xff"}')
    return bench.both()


@case("`glm4 verify` without `transformers`")
def _(bench: Bench) -> Ran:
    bench.monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return bench.glm4("verify", str(bench.model))
