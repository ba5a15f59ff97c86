"""YAML, flags, options and prompts."""

from __future__ import annotations

import os
from pathlib import Path

from error_cases.table import case
from programs import CONFIG, Bench, Ran, finish, start

MODEL_CONFIG = "model:\n  model_config:\n"


@case("no `--config`")
def _(bench: Bench) -> Ran:
    return bench.mindformer(config="")


@case("`--config` names no file")
def _(bench: Bench) -> Ran:
    return bench.mindformer(config="configs/glm4/predict_glm5.yaml")


@case("`--config` names a folder")
def _(bench: Bench) -> Ran:
    return bench.mindformer(config="configs")


@case("the YAML is not valid")
def _(bench: Bench) -> Ran:
    return bench.yaml("run_mode: predict\nseed: [1\n")


@case("the YAML is empty")
def _(bench: Bench) -> Ran:
    return bench.yaml("# nothing\n")


@case("the YAML is not UTF-8")
def _(bench: Bench) -> Ran:
    return bench.yaml("seed: 1  # \udcff\n")


@case("a misspelt key")
def _(bench: Bench) -> Ran:
    return bench.yaml("seed: 1\nmodel:\n  model_confg:\n    max_length: 8\n")


@case("a key twice")
def _(bench: Bench) -> Ran:
    return bench.yaml("seed: 1\nseed: 2\n")


@case("a key of the wrong type")
def _(bench: Bench) -> Ran:
    return bench.yaml(f"{MODEL_CONFIG}    max_length: long\n")


@case("a key that needs its own section")
def _(bench: Bench) -> Ran:
    return bench.yaml("context: 0\n")


@case("a YAML tag that builds an object")
def _(bench: Bench) -> Ran:
    return bench.yaml("seed: !!python/object/apply:os.getpid []\n")


@case("float16 in the YAML")
def _(bench: Bench) -> Ran:
    return bench.yaml(f"{MODEL_CONFIG}    compute_dtype: float16\n")


@case("a key of training")
def _(bench: Bench) -> Ran:
    return bench.yaml("resume_training: True\n")


@case("several cards without `use_parallel`")
def _(bench: Bench) -> Ran:
    return bench.yaml("parallel_config:\n  model_parallel: 2\n")


@case("degrees that do not match the processes")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--use_parallel", "True", "--parallel_config.model_parallel", "2")


@case("`--run_mode train`")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--run_mode", "train")


@case("a misspelt flag")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--predict_batchsize", "2")


@case("a flag without its value")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--seed")


@case("a word that belongs to no flag")
def _(bench: Bench) -> Ran:
    return bench.bare_mindformer("hello", "--config", CONFIG)


@case("`--options` without `=`")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--options", "seed")


@case("`--use_parallel maybe`")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--use_parallel", "maybe")


@case("`--predict_batch_size` does not divide the prompts")
def _(bench: Bench) -> Ran:
    return bench.prompts(b"a\nb\nc\n", "--predict_batch_size", "2")


@case("a misspelt `-o`")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "temprature", "0.6")


@case("`-o` with a word for a number")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "temperature", "hot")


@case("`-o` out of range")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "top_p", "1.5")


@case("`-o` without its value")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "seed")


@case("an empty stop string")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "stop", "")


@case("sampling at temperature 0")
def _(bench: Bench) -> Ran:
    return bench.generate("-o", "do_sample", "true", "-o", "temperature", "0")


@case("a misspelt option of `glm4`")
def _(bench: Bench) -> Ran:
    return bench.generate("--dtpye", "float32")


@case("a misspelt command")
def _(bench: Bench) -> Ran:
    return bench.glm4("genrate", terminal=True)


@case("a command without its argument")
def _(bench: Bench) -> Ran:
    return bench.glm4("plan")


@case("`--raw` with `--system`")
def _(bench: Bench) -> Ran:
    return bench.generate("--raw", "-s", "You are a poet.")


@case("`plan --context` beyond the model's")
def _(bench: Bench) -> Ran:
    return bench.glm4("plan", str(bench.model), "--context", "100000")


@case("no prompt")
def _(bench: Bench) -> Ran:
    return bench.glm4("generate", "-m", str(bench.model))


@case("nothing but blanks on standard input")
def _(bench: Bench) -> Ran:
    return bench.glm4("-m", str(bench.model), stdin=b" \r\n\n")


@case("standard input is not UTF-8")
def _(bench: Bench) -> Ran:
    return bench.glm4("generate", "-m", str(bench.model), stdin="你好".encode("gbk"))


@case("standard input cannot be read")
def _(bench: Bench) -> Ran:
    with Path("closed").open("wb") as write_only:
        return finish(start("hi", "-m", "model", stdin=write_only))


@case("the prompt is not UTF-8")
def _(bench: Bench) -> Ran:
    return bench.generate(prompt=os.fsdecode(b"caf\xe9"))


@case("the prompt is longer than the context")
def _(bench: Bench) -> Ran:
    return bench.generate(prompt="x" * 600)


@case("a prompt of 1 MB")
def _(bench: Bench) -> Ran:
    return bench.glm4("generate", "-m", str(bench.model), stdin=b"all work and no play \n" * 48_000)


@case("the prompt is longer than `--max-model-len`")
def _(bench: Bench) -> Ran:
    return bench.generate("--max-model-len", "8", prompt="a question")


@case("in a chat, a line that is not UTF-8 (the chat goes on)")
def _(bench: Bench) -> Ran:
    return bench.glm4("chat", "-m", str(bench.model), stdin=b"caf\xe9\n/help\n")


@case("no `--predict_data`")
def _(bench: Bench) -> Ran:
    return bench.bare_mindformer("--config", CONFIG, "--pretrained_model_dir", "model")


@case("`--predict_data ''`")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--predict_data", "")


@case("`--predict_data` is not UTF-8")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--predict_data", os.fsdecode(b"caf\xe9"))


@case("`--predict_data` looks like a file that is not there")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--predict_data", "./prompts.txt")


@case("`--predict_data` is a folder")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--predict_data", "model/")


@case("a blank line in the file of prompts")
def _(bench: Bench) -> Ran:
    return bench.prompts(b"one\n\ntwo\n")


@case("a file of prompts that is not UTF-8")
def _(bench: Bench) -> Ran:
    return bench.prompts(b"one\ncaf\xe9\n")


@case("an empty file of prompts")
def _(bench: Bench) -> Ran:
    return bench.prompts(b"")


@case("a line longer than the context")
def _(bench: Bench) -> Ran:
    return bench.prompts(b"one\n" + b"x" * 600 + b"\n")


@case("a degree that does not divide the model")
def _(bench: Bench) -> Ran:
    return bench.glm4("generate", "-m", "model", "--tensor-parallel", "3", "hi")


@case("more stages than layers")
def _(bench: Bench) -> Ran:
    return bench.glm4("generate", "-m", "model", "--pipeline-parallel", "9", "hi")


@case("copies of the model in one program")
def _(bench: Bench) -> Ran:
    return bench.glm4("generate", "-m", "model", "--data-parallel", "2", "hi")


@case("MindSpore is not installed")
def _(bench: Bench) -> Ran:
    return bench.glm4("generate", "-m", "model", "--backend", "mindspore", "hi")


@case("what the MindSpore backend does not do")
def _(bench: Bench) -> Ran:
    return bench.glm4("generate", "-m", "model", "--backend", "mindspore", "--quantization", "int4", "hi")
