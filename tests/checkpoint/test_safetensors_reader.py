"""The safetensors reader gives the very bytes the safetensors library wrote, or refuses the file by name."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from glm4.checkpoint.folder import ModelFolder
from glm4.checkpoint.safetensors_reader import INDEX_NAME, MAX_HEADER_BYTES, Checkpoint
from glm4.errors import CheckpointError

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def make_folder(path: Path) -> Path:
    (path / "config.json").write_text('{"model_type": "glm4"}')
    return path


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder with one file of two tensors."""
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
        make_folder(tmp_path) / "model.safetensors",
    )
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two shards of two tensors each, and their index."""
    make_folder(tmp_path)
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, tmp_path / A)
    save_file({"c": torch.zeros(5), "d": torch.ones(1)}, tmp_path / B)
    write_index(tmp_path, {"a": A, "b": A, "c": B, "d": B})
    return tmp_path


def write_index(path: Path, weight_map: Any) -> None:
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path: Path, header: Any, buffer: bytes = b"", length: int | None = None) -> None:
    """A file with the header and buffer as given, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + buffer)


def open_checkpoint(path: Path) -> Checkpoint:
    return Checkpoint.open(ModelFolder.open(path))


def message(action: Callable[[], object]) -> str:
    """The one line with which `action` is refused."""
    with pytest.raises(CheckpointError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- what is right ------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = st.lists(st.integers(0, 5), max_size=4)
    return {
        name: torch.randn(draw(shapes), generator=generator).to(draw(st.sampled_from(list(DTYPES.values()))))
        for name in names
        if name != "__metadata__"
    }


@given(tensors())
@settings(deadline=None, max_examples=60)
def test_bytes_are_those_the_library_wrote(written: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = make_folder(Path(directory))
        save_file(written, path / "model.safetensors", metadata={"format": "pt"})
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.names()) == set(written)
        for name, value in written.items():
            raw, info = checkpoint.read(name), checkpoint.info(name)
            assert DTYPES[raw.dtype] == value.dtype == DTYPES[info.dtype]
            assert raw.shape == tuple(value.shape) == info.shape
            assert bytes(raw.buffer) == value.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert info.file == path / "model.safetensors"
        checkpoint.check({name: tuple(value.shape) for name, value in written.items()})


def test_views_are_read_only_and_outlive_the_checkpoint(single: Path) -> None:
    buffer = open_checkpoint(single).read("a").buffer
    assert buffer.readonly
    assert torch.frombuffer(bytearray(buffer), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


def test_shards_with_and_without_an_index(sharded: Path) -> None:
    with_index = open_checkpoint(sharded)
    (sharded / INDEX_NAME).unlink()
    without = open_checkpoint(sharded)
    for checkpoint in (with_index, without):
        assert sorted(checkpoint.names()) == ["a", "b", "c", "d"]
        assert checkpoint.info("d").file == sharded / B
        assert bytes(checkpoint.read("d").buffer) == bytes(torch.ones(1).view(torch.uint8).tolist())


def test_links_are_followed(sharded: Path) -> None:
    snapshot = sharded / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", INDEX_NAME, A, B):
        (snapshot / name).symlink_to(sharded / name)
    assert open_checkpoint(snapshot).names() == ["a", "b", "c", "d"]
    (sharded / B).unlink()
    assert f"{snapshot / B} is missing" in message(lambda: open_checkpoint(snapshot))


def test_release_leaves_the_bytes_alone(tmp_path: Path) -> None:
    values = {name: torch.randn(size) for name, size in {"a": 3, "b": 5 * mmap.PAGESIZE, "c": 0}.items()}
    save_file(values, make_folder(tmp_path) / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for name, value in values.items():
        raw = checkpoint.read(name)
        before = bytes(raw.buffer)
        checkpoint.release(name)
        assert bytes(raw.buffer) == before == value.numpy().tobytes()


def test_release_gives_the_pages_back(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1 << 22)}, make_folder(tmp_path) / "model.safetensors")  # 16 MiB
    checkpoint = open_checkpoint(tmp_path)
    name = str(tmp_path / "model.safetensors")
    hash(bytes(checkpoint.read("a").buffer))
    assert resident_bytes(name) >= 16 << 20
    checkpoint.release("a")
    assert resident_bytes(name) < 1 << 20


def resident_bytes(file: str) -> int:
    """Bytes of the file's mapping that are in this process's page tables."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(file):
            return next(int(field.split()[1]) * 1024 for field in lines if field.startswith("Rss:"))
    raise AssertionError(f"{file} is not mapped")


def test_fingerprint_changes_with_config_and_headers_only(sharded: Path) -> None:
    first = open_checkpoint(sharded).fingerprint()
    assert open_checkpoint(sharded).fingerprint() == first
    save_file({"c": torch.zeros(5), "d": torch.zeros(1)}, sharded / B)
    assert open_checkpoint(sharded).fingerprint() == first
    save_file({"c": torch.zeros(5), "d": torch.zeros(2)}, sharded / B)
    second = open_checkpoint(sharded).fingerprint()
    (sharded / "config.json").write_text('{"model_type":  "glm4"}')
    assert len({first, second, open_checkpoint(sharded).fingerprint()}) == 3


def test_no_tensor_library_is_loaded() -> None:
    code = "import sys, glm4.checkpoint.hub, glm4.checkpoint.safetensors_reader; print([m for m in sys.modules])"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'glm4.checkpoint.hub'" in modules
    for name in ("torch", "numpy", "safetensors", "huggingface_hub"):
        assert f"'{name}'" not in modules


# --- files that are not what they should be --------------------------------------------------------------------------


def test_cut_off_file_names_both_sizes(sharded: Path) -> None:
    data = (sharded / B).read_bytes()
    (sharded / B).write_bytes(data[:-5])
    text = message(lambda: open_checkpoint(sharded))
    for word in (str(sharded / B), "cut off", f"{len(data) - 5:,} of {len(data):,} bytes", "glm4 download"):
        assert word in text
    (sharded / B).write_bytes(data + b"x")
    assert f"it has {len(data) + 1:,} bytes, its header describes {len(data):,}" in message(
        lambda: open_checkpoint(sharded)
    )


@pytest.mark.parametrize(
    ("header", "buffer", "words"),
    [
        ({"a": tensor("F99", [1], 0, 4)}, b"1234", "tensor 'a' has the unknown dtype 'F99'"),
        ({"a": tensor("F32", [2], 0, 4)}, b"1234", "tensor 'a' (F32, shape [2]) does not fit its 4 bytes"),
        ({"a": tensor("F4", [1], 0, 1)}, b"1", "tensor 'a' (F4, shape [1]) does not fit its 1 bytes"),
        ({"a": tensor("F32", [2**63] * 8, 0, 4)}, b"1234", "does not fit"),
        ({"a": tensor("F32", [1] * 9, 0, 4)}, b"1234", "has the shape"),
        ({"a": tensor("F32", [-1], 0, 4)}, b"1234", "has the shape [-1]"),
        ({"a": tensor("F32", [True], 0, 4)}, b"1234", "has the shape [True]"),
        ({"a": tensor("F32", [1.0], 0, 4)}, b"1234", "has the shape [1.0]"),
        ({"a": tensor("F32", [0], 4, 0)}, b"1234", "does not fit its -4 bytes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234", "has the data_offsets [0]"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", "has the data_offsets None"),
        ({"a": 1}, b"", "tensor 'a' is not described by an object"),
        ({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 2, 6)}, b"123456", "tensor 'b' overlaps"),
        ({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 6, 10)}, b"1234567890", "tensor 'b' has a gap"),
        ({"a": tensor("F32", [1], 4, 8)}, b"12345678", "tensor 'a' has a gap"),
        (b'{"a": ', b"", "the header is not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "the key 'a' stands twice"),
        (b"{\xff}", b"", "the header is not UTF-8"),
        (b"[1, 2]", b"", "its header is not JSON"),
        (b"", b"", "its header is not JSON"),
    ],
)
def test_damaged_header(tmp_path: Path, header: Any, buffer: bytes, words: str) -> None:
    file = make_folder(tmp_path) / "model.safetensors"
    write_raw(file, header, buffer)
    text = message(lambda: open_checkpoint(tmp_path))
    assert text.startswith(str(file))
    assert words in text


@pytest.mark.parametrize(
    "data", [b"", b"1234567", b"<!DOCTYPE html>\n<html>", b"\xff" * 8, b"\x03" + b"\0" * 7 + b"{}"]
)
def test_not_a_safetensors_file(tmp_path: Path, data: bytes) -> None:
    file = make_folder(tmp_path) / "model.safetensors"
    file.write_bytes(data)
    assert f"{file} is no safetensors file, or damaged ({len(data)} bytes)" in message(
        lambda: open_checkpoint(tmp_path)
    )


def test_header_longer_than_the_format_allows(tmp_path: Path) -> None:
    file = make_folder(tmp_path) / "model.safetensors"
    with file.open("wb") as output:  # sparse: takes no room on disk
        output.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
        output.truncate(MAX_HEADER_BYTES + 100)
    assert "no safetensors file, or damaged" in message(lambda: open_checkpoint(tmp_path))


@pytest.mark.parametrize("raw", [False, True])
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_bytes_are_opened_or_refused(raw: bool, data: st.DataObject) -> None:
    """Random bytes, and true files with some bytes changed: what we accept, the library accepts, and reads alike."""
    if raw:
        content = data.draw(st.binary(max_size=40) | st.binary(max_size=60).map(_with_length))
    else:
        content = bytearray(_VALID)
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    with tempfile.TemporaryDirectory() as directory:
        path = make_folder(Path(directory))
        (path / "model.safetensors").write_bytes(content)
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            assert "model.safetensors" in str(error)
            return
        for name, value in safetensors.deserialize(content):
            assert bytes(checkpoint.read(name).buffer) == bytes(value["data"])
            assert list(checkpoint.info(name).shape) == value["shape"]


def _with_length(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def _valid_file() -> bytes:
    header = {"a": tensor("BF16", [2, 2], 0, 8), "b": tensor("F32", [1], 8, 12), "__metadata__": {"format": "pt"}}
    return _with_length(json.dumps(header).encode()) + bytes(range(12))


_VALID = _valid_file()


def test_the_file_that_is_changed_above_is_valid(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "model.safetensors").write_bytes(_VALID)
    assert bytes(open_checkpoint(tmp_path).read("b").buffer) == bytes(range(8, 12))


# --- folders whose files do not fit together --------------------------------------------------------------------------


def test_index_names_a_missing_file(sharded: Path) -> None:
    (sharded / B).unlink()
    text = message(lambda: open_checkpoint(sharded))
    assert f"{sharded / B} is missing" in text
    assert INDEX_NAME in text


def test_shard_missing_without_an_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    (sharded / A).unlink()
    assert f"{sharded / A} is missing" in message(lambda: open_checkpoint(sharded))


def test_index_without_any_weights(sharded: Path) -> None:
    (sharded / A).unlink()
    (sharded / B).unlink()
    assert "has no weights" in message(lambda: open_checkpoint(sharded))


def test_index_puts_a_tensor_where_it_is_not(sharded: Path) -> None:
    write_index(sharded, {"a": A, "b": A, "c": B, "d": B, "e": B})
    assert f"{sharded / B} has no tensor 'e'" in message(lambda: open_checkpoint(sharded))


def test_index_leaves_a_tensor_out(sharded: Path) -> None:
    write_index(sharded, {"a": A, "c": B, "d": B})
    assert f"{sharded / A} holds tensor 'b', which {INDEX_NAME} does not name" in message(
        lambda: open_checkpoint(sharded)
    )


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"c": torch.zeros(5), "d": torch.ones(1), "b": torch.ones(4)}, sharded / B)
    text = message(lambda: open_checkpoint(sharded))
    assert f"tensor 'b' is both in {sharded / A} and in {sharded / B}" in text


@pytest.mark.parametrize("weight_map", [{}, None, [], {"a": 1}, {"a": "../x.safetensors"}, {"a": "x.bin"}, {"a": ""}])
def test_index_that_is_none(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    text = message(lambda: open_checkpoint(sharded))
    assert text.startswith(str(sharded / INDEX_NAME))


def test_index_that_is_not_json(sharded: Path) -> None:
    (sharded / INDEX_NAME).write_text("{")
    assert f"{sharded / INDEX_NAME} is not valid JSON" in message(lambda: open_checkpoint(sharded))


def test_file_that_nobody_would_read(sharded: Path) -> None:
    save_file({"x": torch.zeros(1)}, sharded / "consolidated.safetensors")
    open_checkpoint(sharded)
    save_file({"x": torch.zeros(1)}, sharded / "extra.safetensors")
    assert f"{sharded / 'extra.safetensors'} would be left unread" in message(lambda: open_checkpoint(sharded))


def test_file_beside_the_single_one(single: Path) -> None:
    save_file({"x": torch.zeros(1)}, single / A)
    assert f"{single / A} would be left unread" in message(lambda: open_checkpoint(single))


@pytest.mark.parametrize("names", [["adapter_model.safetensors"], [A, "model-00001-of-00003.safetensors"]])
def test_safetensors_that_are_no_model(tmp_path: Path, names: list[str]) -> None:
    make_folder(tmp_path)
    for name in names:
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    assert f"{tmp_path} has neither model.safetensors nor {INDEX_NAME}" in message(lambda: open_checkpoint(tmp_path))


# --- tensors that are not what the config asks for -----------------------------------------------------------------


SHAPES = {"a": (2, 3), "b": (4,), "c": (5,), "d": (1,)}


def test_check_accepts_the_right_shapes(sharded: Path) -> None:
    open_checkpoint(sharded).check(SHAPES)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({**SHAPES, "e": (1,), "f": (1,)}, ["has no tensor 'e' (and 1 more)", "config.json"]),
        ({"a": (2, 3), "c": (5,), "d": (1,)}, [A, "holds tensor 'b', which has no place"]),
        ({"a": (2, 3), "b": (4,)}, [B, "holds tensor 'c' (and 1 more)"]),
        ({**SHAPES, "c": (6,)}, [B, "tensor 'c' has shape [5], but config.json asks for [6]"]),
    ],
)
def test_check_names_the_tensor(sharded: Path, expected: dict[str, tuple[int, ...]], words: list[str]) -> None:
    text = message(lambda: open_checkpoint(sharded).check(expected))
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float16, "is F16: GLM-4 overflows in float16"),
        (torch.int8, "is I8, a quantised or unsupported"),
        (torch.float8_e4m3fn, "is F8_E4M3, a quantised or unsupported"),
    ],
)
def test_check_refuses_dtypes(tmp_path: Path, dtype: torch.dtype, words: str) -> None:
    file = make_folder(tmp_path) / "model.safetensors"
    save_file({"a": torch.zeros(4, dtype=dtype)}, file)
    text = message(lambda: open_checkpoint(tmp_path).check({"a": (4,)}))
    assert text.startswith(f"{file}: tensor 'a'")
    assert words in text


def test_check_passes_over_saved_rotary_frequencies(tmp_path: Path) -> None:
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    file = make_folder(tmp_path) / "model.safetensors"
    save_file({"a": torch.zeros(4), extra: torch.zeros(32, dtype=torch.float16)}, file)
    open_checkpoint(tmp_path).check({"a": (4,)})


def test_unknown_tensor(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    for action in (checkpoint.read, checkpoint.info, checkpoint.release):
        assert "has no tensor 'z'" in message(lambda action=action: action("z"))
