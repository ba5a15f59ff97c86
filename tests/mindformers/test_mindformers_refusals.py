"""What is not a job: unknown names, YAML that is none, degrees that do not fit, what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import REPOSITORY, job, refusal

from glm4.errors import CheckpointError, OptionError
from glm4.mindformers.config import read_job

pytestmark = pytest.mark.usefixtures("folder")


class TestUnknown:
    @pytest.mark.parametrize(
        ("flag", "nearest"),
        [
            ("--use_paralel", "--use_parallel"),
            ("--predict-data", "--predict_data"),
            ("--confg", "--config"),
            ("--max_new_tokens", "--generation_config.max_new_tokens"),
            ("--parallel_config.model_paralel", "--parallel_config.model_parallel"),
            ("--contxt.device_id", "--context.device_id"),
        ],
    )
    def test_flag(self, flag: str, nearest: str) -> None:
        assert refusal(flag, "1") == f"unknown flag {flag}; did you mean {nearest}?"

    def test_flag_far_from_all(self) -> None:
        assert refusal("--zzz", "1") == "unknown flag --zzz; --help lists what is known"

    def test_stray_word(self) -> None:
        with pytest.raises(OptionError, match="'你好' belongs to no flag"):
            read_job(["你好"])

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("seed: 1\nuse_paralel: False\n", "job.yaml:2: unknown key 'use_paralel'; did you mean use_parallel?"),
            (
                "context:\n  max_device_memry: 1GB\n",
                "job.yaml:2: unknown key 'context.max_device_memry'; did you mean context.max_device_memory?",
            ),
            (
                "max_device_memory: 1GB\n",
                "job.yaml:1: unknown key 'max_device_memory'; did you mean context.max_device",
            ),
            ("contxt:\n  mode: 0\n", "job.yaml:1: unknown key 'contxt'; did you mean context?"),
            ("seed: 1\nmode: 0\nseed: 2\n", "job.yaml:2: unknown key 'mode'; did you mean context.mode?"),
        ],
    )
    def test_key(self, text: str, expected: str) -> None:
        assert refusal(text=text).startswith(expected)

    def test_the_inside_of_an_ignored_section_is_not_looked_into(self) -> None:
        assert "ignored: trainer.* " in job(text="trainer: &t\n  anything: {at: [all, *t]}\n").notes[0]
        assert "ignored: callbacks.* " in job(text="callbacks:\n  - type: MFLossMonitor\n").notes[0]


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("seed: 1\nrun_mode: predict\nseed: 2\n", "job.yaml:3: seed stands twice (first in line 1)"),
            ("context:\n  mode: 0\ncontext:\n  mode: 1\n", "job.yaml:3: context stands twice (first in line 1)"),
            ("", "job.yaml is empty"),
            ("# only a comment\n", "job.yaml is empty"),
            ("- seed\n", "job.yaml:1: not a list of 'key: value' lines"),
            ("seed\n", "job.yaml:1: not a list of 'key: value' lines"),
            ("seed: 1\ncontext: [\n", "job.yaml:3: not valid YAML"),
            ("seed: 1\n\tmode: 0\n", "job.yaml:2: not valid YAML"),
            ("seed: 1\n---\nseed: 2\n", "job.yaml:2: not valid YAML"),
            ("seed: 1\nrun_mode: '\x01'\n", "job.yaml:2: a control character"),
            ("seed: " + "[" * 5000, "job.yaml: not valid YAML: nested too deeply"),
            ("context: 5\n", "job.yaml:1: context is a section"),
            ("seed: {a: 1}\n", "job.yaml:1: seed takes a value, not a section"),
            ("seed: [1, 2]\n", "job.yaml:1: seed: takes one value, not 2"),
            ("predict_data: [[a]]\n", "job.yaml:1: predict_data takes a value, not a section"),
            ("predict_data: &x [*x]\n", "job.yaml:1: predict_data takes a value, not a section"),
            ("output_dir: !!python/name:os.system ''\n", "job.yaml:1: output_dir: the tag tag:yaml.org,2002:python/"),
            ("? [a]\n: 1\n", "job.yaml:1: a key must be one word"),
            ("seed: *nothing\n", "job.yaml:1: not valid YAML"),
        ],
    )
    def test_mistakes_are_one_line_with_the_line_number(self, text: str, expected: str) -> None:
        assert refusal(text=text).startswith(expected)

    def test_not_utf8(self) -> None:
        Path("bad.yaml").write_bytes("seed: 1\nrun_mode: 预测\n".encode("gbk"))
        with pytest.raises(OptionError, match=r"bad\.yaml:2: not UTF-8"):
            read_job(["--config", "bad.yaml"])

    def test_byte_order_mark(self) -> None:
        assert job(text="\ufeffseed: 4\n").engine.seed == 4

    def test_config_is_the_callers_and_then_the_repositorys(self, tmp_path: Path) -> None:
        repository = tmp_path / "repository"
        repository.mkdir()
        (repository / "one.yaml").write_text("seed: 1\n")
        flags = ("--config", "one.yaml", "--predict_data", "x", "--pretrained_model_dir", "model")
        assert read_job(flags, repository).engine.seed == 1
        Path("one.yaml").write_text("seed: 2\n")
        assert read_job(flags, repository).engine.seed == 2

    def test_config_that_is_not_there(self, tmp_path: Path) -> None:
        for flags, expected in (
            ([], "--config is missing"),
            (["--config", "no.yaml"], f"--config no.yaml: no such file (looked in {tmp_path} and {REPOSITORY})"),
            (["--config", "model"], "--config model is a folder"),
            (["--config", "a.yaml", "b.yaml"], "--config takes one value, not 2"),
        ):
            with pytest.raises(OptionError) as caught:
                read_job(flags, REPOSITORY)
            assert str(caught.value).startswith(expected)


class TestParallel:
    def test_one_process(self) -> None:
        assert job("--use_parallel", "True", environment={"WORLD_SIZE": "1"})

    @pytest.mark.parametrize(
        ("flags", "processes", "expected"),
        [
            (
                ("--use_parallel", "True", "--parallel_config.model_parallel", "2"),
                "1",
                "the parallel degrees multiply to 2, but the number of processes (WORLD_SIZE) is 1: "
                'start 2 with bash scripts/msrun_launcher.sh "run_mindformer.py …" 2, or change a degree',
            ),
            (
                (
                    *("--use_parallel", "True", "--parallel_config.model_parallel", "2"),
                    *("--parallel_config.data_parallel=2",),
                ),
                "2",
                "the parallel degrees multiply to 4, but the number of processes (WORLD_SIZE) is 2",
            ),
            ((), "2", "the parallel degrees multiply to 1, but the number of processes (WORLD_SIZE) is 2"),
            (
                ("--use_parallel", "False", "--parallel_config.model_parallel", "2"),
                "2",
                "parallel_config.model_parallel 2 needs use_parallel True",
            ),
            ((), "two", "WORLD_SIZE: 'two' is not a whole number"),
        ],
    )
    def test_refusals(self, flags: tuple[str, ...], processes: str, expected: str) -> None:
        assert refusal(*flags, environment={"WORLD_SIZE": processes}).startswith(expected)

    def test_degrees_reach_the_engine(self) -> None:
        text = "use_parallel: True\nparallel_config:\n  data_parallel: 2\n  model_parallel: 2\n  pipeline_stage: 3\n"
        environment = {"RANK": "7", "WORLD_SIZE": "12", "LOCAL_RANK": "7", "LOCAL_WORLD_SIZE": "12"}
        found = job(text=text, environment=environment)
        engine, place = found.engine, found.place
        assert (engine.tensor_parallel, engine.pipeline_parallel, engine.data_parallel) == (2, 3, 2)
        assert (place.rank, place.data_rank, place.pipeline_rank, place.tensor_rank) == (7, 1, 0, 1)

    def test_the_32b_yaml_runs_in_one_process(self) -> None:
        text = (REPOSITORY / "configs/glm4/predict_glm4_32b.yaml").read_text(encoding="utf-8")
        assert job("--pretrained_model_dir", "model", text=text).engine.max_device_memory == 78 * 2**30

    @pytest.mark.parametrize("name", ["n", "best_of", "logprobs", "prompt_logprobs"])
    def test_what_the_result_file_has_no_place_for(self, name: str) -> None:
        assert "the result file has one text for a prompt" in refusal(f"--generation_config.{name}", "2")


class TestMissing:
    def test_prompt(self) -> None:
        Path("job.yaml").write_text("seed: 1\n")
        with pytest.raises(OptionError, match="predict_data is missing"):
            read_job(["--config", "job.yaml", "--pretrained_model_dir", "model"])

    def test_model(self) -> None:
        Path("job.yaml").write_text("seed: 1\n")
        with pytest.raises(OptionError, match="pretrained_model_dir is missing"):
            read_job(["--config", "job.yaml", "--predict_data", "x"])

    @pytest.mark.parametrize(("name", "reason"), [("/path/hf_dir", "does not exist"), ("job.yaml", "is a file")])
    def test_model_folder(self, name: str, reason: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            job(text=f"seed: 1\npretrained_model_dir: '{name}'\n")
        assert str(caught.value).startswith(f"job.yaml:2: pretrained_model_dir: {name} {reason}")
