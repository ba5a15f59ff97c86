"""A model folder is either read exactly or refused in one line that names what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import Checkpoint
from glm4.errors import CheckpointError, ConfigError
from glm4.files import parse_json

CONFIG = {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def message(path: str | Path, action: Callable[[str | Path], object] = ModelFolder.open) -> str:
    """The one line with which `action` refuses the folder."""
    with pytest.raises(CheckpointError) as caught:
        action(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reads_the_official_folder(official_9b: Path) -> None:
    folder = ModelFolder.open(official_9b)
    assert folder.read_json("config.json")["num_hidden_layers"] == 40
    assert folder.read_text("chat_template.jinja") == (official_9b / "chat_template.jinja").read_text("utf-8")
    assert folder.read_json("missing.json", required=False) is None
    assert folder.read_text("missing.txt", required=False) is None


@pytest.mark.parametrize("name", ["GLM-4-32B-0414", "GLM-Z1-9B-0414", "GLM-Z1-32B-0414", "GLM-Z1-Rumination-32B-0414"])
def test_opens_every_folder_of_the_family(shared: Path, name: str) -> None:
    assert ModelFolder.open(shared / "glm4-0414" / name).path.name == name


def test_follows_links_as_a_download_cache_has_them(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    (tmp_path / "link").symlink_to(snapshot)
    assert ModelFolder.open(tmp_path / "link").read_json("config.json") == CONFIG


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert ModelFolder.open("~/model").path == folder


def test_name_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = message("zai-org/GLM-4-9B-0414")
    assert "`glm4 download zai-org/GLM-4-9B-0414`" in text
    assert "`-m GLM-4-9B-0414`" in text


@pytest.mark.parametrize("given", ["/no/such/folder", "nothing here", "a\0b", "~nobody-of-that-name/x"])
def test_path_that_is_not_there(given: str) -> None:
    text = message(given)
    assert repr(given) in text
    assert "glm4 download" in text


def test_no_path() -> None:
    assert "no model folder given" in message("")


def test_path_too_long() -> None:
    assert "File name too long" in message("x" * 5000)


def test_file_instead_of_a_folder(folder: Path) -> None:
    assert "is a file: give the folder" in message(folder / "config.json")


def test_unreadable_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, os.strerror(13), str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)  # the tests may run as root, whom no mode bits stop
    assert message(folder) == f"{folder} cannot be read: Permission denied"


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in message(folder)


def test_download_cache_points_to_its_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--zai-org--GLM-4-9B-0414" / "snapshots" / "645b8482"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    assert str(snapshot) in message(snapshot.parent.parent)


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00004.safetensors.incomplete",
        ".cache/huggingface/download/abc=.def.incomplete",
        "model.safetensors.part",
        "model.safetensors.aria2",
    ],
)
def test_half_downloaded(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    text = message(folder)
    assert "half downloaded" in text
    assert name in text
    (folder / "config.json").unlink()  # the reason stays the same where even the config is still to come
    assert message(folder) == text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["ChatGLMModel"], "model_type": "chatglm"}, ["ChatGLMModel", "first GLM-4-9B"]),
        ({"architectures": ["GlmForCausalLM"], "model_type": "glm"}, ["GlmForCausalLM", "GLM-Edge"]),
        ({"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"}, ["Glm4MoeForCausalLM", "GLM-4.5"]),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, ["LlamaForCausalLM"]),
        ({"architectures": ["Glm4ForCausalLM"], "model_type": "llama"}, ["model_type llama"]),
        ({"architectures": "Glm4"}, ["Glm4"]),
        ({}, ["no architecture"]),
    ],
)
def test_other_architecture(folder: Path, config: dict[str, object], words: list[str]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    text = message(folder)
    for word in [*words, str(folder / "config.json"), "GLM-4-0414 family"]:
        assert word in text


@pytest.mark.parametrize("config", [{"architectures": ["Glm4ForCausalLM"]}, {"model_type": "glm4"}])
def test_one_of_the_two_names_is_enough(folder: Path, config: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert ModelFolder.open(folder).read_json("config.json") == config


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{\n  "a": 1,\n}', "line 3, column 1"),
        (b'{"a": 1', "line 1, column 8"),
        (b"[1]", "holds a list"),
        (b"\xff{}", "is not UTF-8 text: byte 0 is 0xff"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_is_none(folder: Path, data: bytes, words: str) -> None:
    (folder / "config.json").write_bytes(data)
    text = message(folder)
    assert text.startswith(str(folder / "config.json"))
    assert words in text
    with pytest.raises(ConfigError):
        parse_json(data, "x")


def test_missing_required_file(folder: Path) -> None:
    text = message(folder, lambda path: ModelFolder.open(path).read_json("tokenizer.json"))
    assert str(folder / "tokenizer.json") in text


def test_unreadable_file(folder: Path) -> None:
    (folder / "tokenizer.json").mkdir()
    text = message(folder, lambda path: ModelFolder.open(path).read_text("tokenizer.json", required=False))
    assert text.startswith(f"{folder / 'tokenizer.json'} cannot be read: Is a directory")


def test_git_lfs_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 19966496\n"
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).write_text(pointer)
    opened = ModelFolder.open(folder)
    for action, name in (
        (lambda _: opened.read_json("tokenizer.json"), "tokenizer.json"),
        (lambda _: Checkpoint.open(opened), "model.safetensors"),
    ):
        text = message(folder, action)
        assert f"{folder / name} is a Git LFS pointer" in text
        assert "git lfs pull" in text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "has no weights"),
        (["pytorch_model-00001-of-00002.bin"], "pickled weights (pytorch_model-00001-of-00002.bin)"),
        (["consolidated.00.pth"], "pickled weights (consolidated.00.pth)"),
        (["GLM-4-9B-0414-Q4_K_M.gguf"], "GGUF weights (GLM-4-9B-0414-Q4_K_M.gguf)"),
    ],
)
def test_other_weights(folder: Path, names: list[str], words: str) -> None:
    for name in names:
        (folder / name).touch()
    text = message(folder, lambda path: Checkpoint.open(ModelFolder.open(path)))
    assert words in text
    assert "safetensors" in text


def test_gguf_without_config(folder: Path) -> None:
    (folder / "config.json").rename(folder / "m.gguf")
    assert "GGUF weights (m.gguf)" in message(folder)
