"""Devices, memory, disks, streams, signals and hubs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

from error_cases.table import case
from programs import CONFIG, Bench, Ran, finish, start

from glm4.checkpoint import transfer
from glm4.engine.step import StepPlan, StepResult
from glm4.engine.torch_runner import TorchRunner

RESULT = Path("text_generation_result.txt")


@case("`--device cuda` without such a card")
def _(bench: Bench) -> Ran:
    return bench.generate("--device", "cuda")


@case("`--device npu` without such a card")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--device_target", "Ascend")


@case("`--device tpu`")
def _(bench: Bench) -> Ran:
    return bench.generate("--device", "tpu")


@case("`--dtype float16`")
def _(bench: Bench) -> Ran:
    return bench.generate("--dtype", "float16")


@case("`--dtype int8`")
def _(bench: Bench) -> Ran:
    return bench.generate("--dtype", "int8")


@case("`--kv-cache-dtype int4`")
def _(bench: Bench) -> Ran:
    return bench.generate("--kv-cache-dtype", "int4")


@case("a card that does not exist")
def _(bench: Bench) -> Ran:
    bench.monkeypatch.setattr("glm4.device.available_devices", lambda: ["cuda", "cpu"])
    bench.monkeypatch.setattr("torch.get_device_module", lambda name: SimpleNamespace(device_count=lambda: 2))
    return bench.generate("--device", "cuda", "--device-id", "2")


@case("`--max-device-memory lots`")
def _(bench: Bench) -> Ran:
    return bench.generate("--max-device-memory", "lots")


@case("`--max-device-memory 150%`")
def _(bench: Bench) -> Ran:
    return bench.generate("--max-device-memory", "150%")


@case("`--max-device-memory 1MB`")
def _(bench: Bench) -> Ran:
    return bench.generate("--max-device-memory", "1MB")


@case("the model does not fit")
def _(bench: Bench) -> Ran:
    bench.monkeypatch.setattr("glm4.device.free_memory", lambda device: 2**20)
    return bench.generate()


@case("it would fit with a smaller step")
def _(bench: Bench) -> Ran:
    bench.monkeypatch.setattr("glm4.device.free_memory", lambda device: 3 * 2**20)
    return bench.generate()


@case("`plan --memory` is too small")
def _(bench: Bench) -> Ran:
    return bench.glm4("plan", str(bench.model), "--memory", "1MB")


@case("`--max-model-len` beyond the model's")
def _(bench: Bench) -> Ran:
    return bench.generate("--max-model-len", "100000")


@case("the card runs out of memory while it answers")
def _(bench: Bench) -> Ran:
    def execute(runner: TorchRunner, plan: StepPlan) -> StepResult:
        raise RuntimeError("out of memory")

    bench.monkeypatch.setattr(TorchRunner, "execute", execute)
    return bench.both()


@case("the folder of the result cannot be written")
def _(bench: Bench) -> Ran:
    bench.monkeypatch.chdir("/proc")
    return bench.mindformer("--output_dir", str(bench.folder / "output"))


@case("the result's name is taken by a folder")
def _(bench: Bench) -> Ran:
    RESULT.mkdir()
    return bench.mindformer()


@case("the disk is full when the result is written")
def _(bench: Bench) -> Ran:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    RESULT.write_text("old")
    bench.monkeypatch.setattr(os, "fsync", full)
    ran = bench.mindformer()
    assert RESULT.read_text() == "old"
    assert [path.name for path in bench.folder.glob("*text_generation*")] == [RESULT.name]
    return ran


@case("`--output_dir` cannot be written")
def _(bench: Bench) -> Ran:
    return bench.mindformer("--output_dir", "/proc/none")


@case("the current folder was removed")
def _(bench: Bench) -> Ran:
    Path("gone").mkdir()
    bench.monkeypatch.chdir("gone")
    (bench.folder / "gone").rmdir()
    return bench.mindformer()


@case("standard output is on a full disk")
def _(bench: Bench) -> Ran:
    with Path("/dev/full").open("wb") as full:
        return finish(start("hi", "-m", "model", stdin=subprocess.DEVNULL, stdout=full))


@case("standard output is on a full disk (`run_mindformer.py`)")
def _(bench: Bench) -> Ran:
    with Path("/dev/full").open("wb") as full:
        flags = ("--pretrained_model_dir", "model", "--predict_data", "hi", "--generation_config.max_new_tokens", "2")
        return finish(start("run_mindformer.py", "--config", CONFIG, *flags, stdout=full))


@case("in a chat, `/save` to a folder that is not there (the chat goes on)")
def _(bench: Bench) -> Ran:
    return bench.glm4("chat", "-m", str(bench.model), stdin=b"/save nowhere/chat.json\n")


@contextmanager
def hub(*answers: tuple[int, bytes]) -> Iterator[str]:
    """The address of a server on loopback that gives these answers, the last one for ever."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def listing(size: int) -> bytes:
    """A hub's list of one file of weights."""
    file = {"rfilename": "model.safetensors", "size": size, "lfs": {"sha256": "00" * 32}}
    return json.dumps({"sha": "c0ffee", "siblings": [file]}).encode()


def download(bench: Bench, *answers: tuple[int, bytes]) -> Ran:
    """`glm4 download` from a hub that gives these answers."""
    bench.monkeypatch.setattr(transfer, "FIRST_PAUSE_SECONDS", 0.0)
    with hub(*answers) as url:
        return bench.glm4("download", "zai-org/GLM-4-9B-0414", "--endpoint", url, "--to", "new")


@case("not the name of a model")
def _(bench: Bench) -> Ran:
    return bench.glm4("download", "GLM-4-9B-0414")


@case("`--endpoint` is no address")
def _(bench: Bench) -> Ran:
    return bench.glm4("download", "zai-org/GLM-4-9B-0414", "--endpoint", "hf-mirror.com")


@case("the hub cannot be reached")
def _(bench: Bench) -> Ran:
    bench.monkeypatch.setattr(transfer, "FIRST_PAUSE_SECONDS", 0.0)
    return bench.glm4("download", "zai-org/GLM-4-9B-0414", "--endpoint", "http://127.0.0.1:1")


@case("the model does not exist there")
def _(bench: Bench) -> Ran:
    return download(bench, (404, b""))


@case("the model needs a token")
def _(bench: Bench) -> Ran:
    return download(bench, (401, b""))


@case("the server is in trouble")
def _(bench: Bench) -> Ran:
    return download(bench, (503, b""))


@case("the address is of something else")
def _(bench: Bench) -> Ran:
    return download(bench, (200, b"<html>"))


@case("the wrong bytes came")
def _(bench: Bench) -> Ran:
    return download(bench, (200, listing(4)), (200, b"evil"))


@case("no safetensors there")
def _(bench: Bench) -> Ran:
    return download(bench, (200, b'{"sha": "c0ffee", "siblings": []}'))


@case("the folder holds other files")
def _(bench: Bench) -> Ran:
    Path("new").mkdir()
    Path("new/thesis.tex").touch()
    return download(bench, (200, listing(4)), (200, b"evil"))


@case("the disk is too small")
def _(bench: Bench) -> Ran:
    usage = shutil.disk_usage(".")._replace(free=10**9)
    bench.monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return download(bench, (200, listing(18_800_000_000)))


@case("the disk is full while a file is written")
def _(bench: Bench) -> Ran:
    Path("new").mkdir()
    Path("new/model.safetensors.incomplete").symlink_to("/dev/full")
    return download(bench, (200, listing(4)), (200, b"good"))


def long_context(bench: Bench) -> None:
    """Let the model talk for minutes."""
    bench.edit_config(max_position_embeddings=100_000)


@case("Ctrl-C while `glm4 generate` answers")
def _(bench: Bench) -> Ran:
    long_context(bench)
    process = start("hi", "-m", "model", "-o", "ignore_eos", "true", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    return finish(process)


@case("Ctrl-C while `run_mindformer.py` answers its first batch (the old result stays)")
def _(bench: Bench) -> Ran:
    long_context(bench)
    RESULT.write_text("old")
    flags = ("--pretrained_model_dir", "model", "--predict_data", "hi", "--generation_config.ignore_eos", "True")
    process = start("run_mindformer.py", "--config", CONFIG, *flags)
    assert process.stderr is not None
    while b"ready after" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    ran = finish(process)
    assert RESULT.read_text() == "old"
    return ran
