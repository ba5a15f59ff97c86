"""YAML and flags to a job: every row of the flags table, precedence, and what a mistake gets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jobs import job, refusal

from glm4.errors import Glm4Error
from glm4.mindformers.help import help_text
from glm4.mindformers.keys import KEYS, find

pytestmark = pytest.mark.usefixtures("folder")

REPOSITORY = Path(__file__).resolve().parents[2]

OFFICIAL = """\
seed: 0
output_dir: './output' # where logs and strategies go
load_checkpoint: ''
use_parallel: False
run_mode: 'predict'
use_legacy: False
load_ckpt_format: 'safetensors'
trainer:
  type: CausalLanguageModelingTrainer
  model_name: 'glm4'
parallel_config:
  data_parallel: 1
  model_parallel: 1
pretrained_model_dir: '/path/hf_dir'
model:
  model_config:
    compute_dtype: "bfloat16"
    layernorm_compute_dtype: "float32"
    softmax_compute_dtype: "float32"
    rotary_dtype: "bfloat16"
    params_dtype: "bfloat16"
context:
  mode: 0 #0--Graph Mode; 1--Pynative Mode
  enable_graph_kernel: False
  ascend_config:
    precision_mode: "must_keep_origin_dtype"
  max_device_memory: "59GB"
  save_graphs: False
  save_graphs_path: "./graph"
parallel:
  parallel_mode: "MANUAL_PARALLEL"
  enable_alltoall: False
"""
"""The keys and values of MindSpore Transformers' own predict_glm4.yaml."""


class TestOfficialYaml:
    def test_is_read(self) -> None:
        read = job("--pretrained_model_dir", "model", text=OFFICIAL)
        assert read.engine.model == "model"
        assert read.engine.seed == 0
        assert read.engine.dtype == "bfloat16"
        assert read.engine.max_device_memory == 59 * 2**30
        assert read.output_dir == Path("output")

    def test_each_key_is_honoured_or_ignored_with_its_reason(self) -> None:
        def leaves(section: dict[str, object], prefix: str = "") -> list[str]:
            found = []
            for name, value in section.items():
                path = f"{prefix}{name}"
                found += leaves(value, f"{path}.") if isinstance(value, dict) else [path]
            return found

        notes = "\n".join(job("--pretrained_model_dir", "model", text=OFFICIAL).notes)
        paths = leaves(yaml.safe_load(OFFICIAL))
        assert len(paths) == 25
        for path in paths:
            key = find(path)
            assert key is not None, path
            assert bool(key.sets) or f"ignored: {key.path} — {key.ignored}" in notes, path

    @pytest.mark.parametrize("path", ["predict_glm4.yaml", "predict_glm4_32b.yaml"])
    def test_ours_is_known_to_its_last_key(self, path: str) -> None:
        text = (REPOSITORY / "configs/glm4" / path).read_text(encoding="utf-8")
        flags = ("--pretrained_model_dir", "model", "--parallel_config.model_parallel", "1", "--use_parallel", "false")
        read = job(*flags, text=text)
        assert read.engine.dtype == "bfloat16"
        assert [note for note in read.notes if "context.mode" not in note] == []

    def test_our_commented_keys_are_known_too(self) -> None:
        text = (REPOSITORY / "configs/glm4/predict_glm4.yaml").read_text(encoding="utf-8")
        read = job("--pretrained_model_dir", "model", text=re.sub(r"(?m)^(\s*)# (\s*\w+:)", r"\1\2", text))
        assert (read.sampling.max_new_tokens, read.sampling.top_k, read.sampling.do_sample) == (512, 40, True)
        assert (read.engine.max_model_len, read.engine.device) == (None, "npu")


class TestFlags:
    @pytest.mark.parametrize("value", ["True", "true", "TRUE", "False", "false"])
    def test_use_parallel_in_any_case(self, value: str) -> None:
        assert job("--use_parallel", value).prompts == ("你好",)

    def test_run_mode(self) -> None:
        assert job("--run_mode", "predict")
        assert refusal("--run_mode", "finetune") == (
            "--run_mode: 'finetune' is not part of this program, only 'predict' is"
        )
        assert "did you mean 'predict'?" in refusal("--run_mode", "predicted")
        assert refusal(text="run_mode: train\n").startswith("job.yaml:1: run_mode: 'train' is not part")

    def test_predict_data_and_batch_size(self) -> None:
        read = job("--predict_data", "一", "二", "三", "四", "--predict_batch_size", "2")
        assert read.batches == [["一", "二"], ["三", "四"]]
        assert job("--predict_data", "一", "二").batches == [["一"], ["二"]]

    def test_predict_data_in_yaml(self) -> None:
        assert job(text="predict_data: [一, '2', 3.0]\npredict_batch_size: 3\n").batches == [["一", "2", "3.0"]]
        assert job(text="predict_data: 2024-01-01\n").prompts == ("2024-01-01",)

    def test_batch_size_must_divide(self) -> None:
        message = refusal("--predict_data", *"abcdef", "--predict_batch_size", "4")
        assert message.startswith("predict_batch_size 4 does not divide the 6 prompts: use 1 or 2 or 3 or 6")

    @pytest.mark.parametrize("size", ["0", "-1", "two"])
    def test_batch_size_must_be_a_count(self, size: str) -> None:
        assert refusal("--predict_batch_size", size).startswith("--predict_batch_size: ")

    def test_auto_trans_ckpt_is_accepted(self) -> None:
        expected = "ignored: auto_trans_ckpt — tensors are always sharded while they load"
        assert expected in job("--auto_trans_ckpt", "True").notes

    def test_seed_device_and_output_dir(self) -> None:
        flags = ("--seed", "3", "--device_id", "2", "--device_target", "CPU", "--output_dir", "logs")
        read = job(*flags, "--mode", "1")
        assert (read.engine.seed, read.engine.device_id, read.engine.device) == (3, 2, "cpu")
        assert read.output_dir == Path("logs")

    @pytest.mark.parametrize(("target", "device"), [("Ascend", "npu"), ("GPU", "cuda"), ("cpu", "cpu")])
    def test_device_target(self, target: str, device: str) -> None:
        assert job(text=f"context:\n  device_target: {target}\n").engine.device == device

    def test_device_is_automatic_if_not_said(self) -> None:
        assert job().engine.device == "auto"
        assert refusal("--device_target", "TPU") == "--device_target: 'TPU' is none of: Ascend, GPU, CPU"

    def test_do_sample(self) -> None:
        assert job("--do_sample", "True").sampling.do_sample is True
        assert job().sampling.do_sample is None

    def test_use_chat_template(self) -> None:
        assert job().use_chat_template is None
        assert job("--use_chat_template", "False").use_chat_template is False

    def test_options(self) -> None:
        flags = ("--options", "generation_config.stop=a=b", "seed=9", "context.max_device_memory=8GB")
        read = job(*flags)
        assert read.sampling.stop == ("a=b",)
        assert (read.engine.seed, read.engine.max_device_memory) == (9, 8 * 2**30)
        assert refusal("--options", "seed") == "--options seed: write it as key=value"
        assert "unknown key 'sed'; did you mean seed?" in refusal("--options", "sed=1")

    def test_dotted_overrides_in_both_spellings(self) -> None:
        spelt_apart = job("--generation_config.max_new_tokens", "20", "--model.model_config.max_length", "100")
        spelt_together = job("--generation_config.max_new_tokens=20", "--model.model_config.max_length=100")
        assert spelt_apart == spelt_together
        assert (spelt_apart.sampling.max_new_tokens, spelt_apart.engine.max_model_len) == (20, 100)

    def test_values_with_equals_signs_survive(self) -> None:
        assert job("--predict_data=a=b==c").prompts == ("a=b==c",)
        assert job("--predict_data", "x=1, y=2", "--seed=1").prompts == ("x=1, y=2",)

    def test_words_that_begin_with_a_dash_are_values(self) -> None:
        assert job("--predict_data", "-5 + 3 = ?", "-h", "-- what is it").prompts == (
            "-5 + 3 = ?",
            "-h",
            "-- what is it",
        )
        assert job("--generation_config.frequency_penalty", "-0.5").sampling.frequency_penalty == -0.5

    def test_the_last_of_a_repeated_flag_counts(self) -> None:
        assert job("--seed", "1", "--seed", "2").engine.seed == 2
        assert job("--options", "seed=1", "--seed", "2", "--options", "seed=3").engine.seed == 3

    def test_load_checkpoint(self, folder: Path) -> None:
        assert job("--load_checkpoint", "model").engine.model == "model"
        assert (
            job("--load_checkpoint", str(folder / "model"), "--pretrained_model_dir", "model").engine.model == "model"
        )
        assert job("--load_checkpoint", "", "--pretrained_model_dir", "model").engine.model == "model"
        message = refusal("--load_checkpoint", "other", "--pretrained_model_dir", "model")
        assert message.startswith("load_checkpoint other is another folder than pretrained_model_dir model")

    @pytest.mark.parametrize(
        "flag", ["do_eval", "epochs", "train_dataset_dir", "eval_dataset_dir", "sink_mode", "num_samples", "batch_size"]
    )
    def test_training_flags_are_refused_by_name(self, flag: str) -> None:
        assert refusal(f"--{flag}", "1").startswith(f"--{flag}: training is not part of this program")

    def test_a_training_flag_that_says_no_is_fine(self) -> None:
        assert "ignored: do_eval — training is not part of this program" in job("--do_eval", "False").notes


class TestPrecedence:
    def test_defaults_then_yaml_then_flags(self) -> None:
        assert job(text="use_parallel: False\n").engine.seed is None
        assert job(text="seed: 5\n").engine.seed == 5
        assert job("--seed", "6", text="seed: 5\n").engine.seed == 6

    def test_a_null_says_nothing(self) -> None:
        assert job(text="seed:\ncontext:\n  device_id: ~\nmodel:\n").engine.seed is None

    def test_two_keys_for_one_option(self) -> None:
        text = "generation_config:\n  top_k: 5\nmodel:\n  model_config:\n    top_k: 6\n"
        assert refusal(text=text) == (
            "job.yaml:5: model.model_config.top_k says 6, but job.yaml:2: generation_config.top_k says 5: "
            "they mean the same, so keep one"
        )
        assert job(text=text.replace("6", "5")).sampling.top_k == 5
        assert job("--model.model_config.top_k", "9", text="generation_config:\n  top_k: 5\n").sampling.top_k == 9
        assert job("--generation_config.top_k", "9", text="model:\n  model_config:\n    top_k: 5\n").sampling.top_k == 9


class TestValues:
    def test_dtypes(self) -> None:
        assert job().engine.dtype == "auto"
        assert job("--model.model_config.params_dtype", "float32").engine.dtype == "float32"
        both = ("--model.model_config.compute_dtype", "float32", "--model.model_config.params_dtype", "bfloat16")
        read = job(*both)
        assert read.engine.dtype == "float32"
        assert any("params_dtype" in note and "float32" in note for note in read.notes)

    @pytest.mark.parametrize("key", ["compute_dtype", "params_dtype"])
    def test_float16_is_refused_with_the_reason(self, key: str) -> None:
        message = refusal(text=f"model:\n  model_config:\n    {key}: float16\n")
        assert message.startswith(f"job.yaml:3: model.model_config.{key}: ")
        assert "overflows" in message

    def test_generation_config(self) -> None:
        text = """\
generation_config:
  do_sample: true
  temperature: 1e-1
  top_k: 3
  top_p: .9
  min_p: 0.05
  max_new_tokens: 30
  max_length: 64
  repetition_penalty: 1.1
  stop: [END, "。"]
  stop_token_ids: [5, 6]
  seed: 11
"""
        read = job(text=text)
        sampling = read.sampling
        assert (sampling.do_sample, sampling.temperature, sampling.top_k, sampling.top_p) == (True, 0.1, 3, 0.9)
        assert (sampling.min_p, sampling.max_new_tokens, sampling.repetition_penalty) == (0.05, 30, 1.1)
        assert (sampling.stop, sampling.stop_token_ids, sampling.seed) == (("END", "。"), (5, 6), 11)
        assert read.engine.max_model_len == 64

    def test_an_empty_list_says_nothing(self) -> None:
        assert job(text="generation_config:\n  stop: []\n").sampling.stop == ()
        assert "predict_data is missing" in refusal(text="predict_data: []\n")

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (("--generation_config.top_p", "3"), "--generation_config.top_p: 3.0 is out of range"),
            (("--generation_config.top_k", "many"), "--generation_config.top_k: 'many' is not a whole number"),
            (("--do_sample", "maybe"), "--do_sample: 'maybe' is neither True nor False"),
            (("--use_parallel", "maybe"), "--use_parallel: 'maybe' is neither True nor False"),
            (("--context.max_device_memory", "59XB"), "--context.max_device_memory: '59XB' is not an amount of memory"),
            (("--seed", "1", "2"), "--seed: takes one value, not 2: 1 2"),
            (("--seed",), "--seed needs a value"),
            (("--mode", "2"), "--mode: '2' is none of: 0, 1"),
            (("--load_ckpt_format", "ckpt"), "--load_ckpt_format: 'ckpt' is none of: safetensors"),
            (("--context.save_graphs", "x"), "--context.save_graphs: 'x' is neither True nor False"),
            (("--debug", "x"), "--debug takes no value"),
            (("--model.model_config.block_size", "0"), "--model.model_config.block_size: 0 is out of range"),
            (("--parallel_config.model_parallel", "0"), "--parallel_config.model_parallel: 0 is out of range"),
        ],
    )
    def test_a_bad_value_names_its_flag(self, flags: tuple[str, ...], expected: str) -> None:
        assert refusal(*flags).startswith(expected)

    def test_what_does_not_go_together(self) -> None:
        assert "temperature 0 means greedy" in refusal("--do_sample", "True", "--generation_config.temperature", "0")


class TestTable:
    def test_each_key_does_one_thing(self) -> None:
        assert all(sum(map(bool, (key.sets, key.ignored, key.refused))) == 1 for key in KEYS)
        assert len({key.path for key in KEYS}) == len(KEYS)

    def test_help_names_every_key(self) -> None:
        text = help_text()
        assert all(f"--{key.path}" in text and f"--{key.flag}" in text for key in KEYS)


def test_a_bad_flag_is_found_without_a_tensor_library() -> None:
    code = (
        "import sys; from glm4.mindformers.run import main; code = main(['--sed', '1']); "
        "assert not {'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "error: unknown flag --sed; did you mean --seed?\n")


def test_every_error_is_expected(folder: Path) -> None:
    """Each flag with nothing, junk and a list: an OptionError or the like, never a bug."""
    for key in KEYS:
        for values in ([], ["\x00"], ["a", "b"], ["9" * 300], ["ｘ" * 300], ["~nobody-here/x"]):
            try:
                job(f"--{key.path.removesuffix('.*')}", *values)
            except Glm4Error as error:
                assert "\n" not in str(error)
