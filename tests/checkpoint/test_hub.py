"""Downloads from two small hubs on loopback: one answers like Hugging Face, one like ModelScope."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants
import pytest
from click.testing import CliRunner

from glm4.checkpoint import transfer
from glm4.checkpoint.hub import HuggingFace, download
from glm4.cli.download import command
from glm4.errors import DownloadError, Glm4Error, OptionError, OutputError

REPO = "zai-org/GLM-4-tiny"
SHARD = "model.safetensors"
NEEDED = {
    "config.json": b'{"model_type": "glm4"}',
    "chat_template.jinja": "{# 模板 #}".encode(),
    "LICENSE": b"MIT",
    "README.md": b"# tiny",
    "generation_config.json": b"",
    SHARD: bytes(range(256)) * 9000,  # more than two chunks
}
NOT_NEEDED = {
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"import os",
    "consolidated.safetensors": b"again",
    "figures/plan.json": b"{}",
    ".gitattributes": b"x",
}


class FakeHub(ThreadingHTTPServer):
    """Files, what the listing says about them, and faults to make."""

    daemon_threads = True

    def __init__(self, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kind = kind
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {**NEEDED, **NOT_NEEDED}
        self.served: dict[str, bytes] = {}  # sent in place of the file that the listing describes
        self.statuses: list[int] = []  # answered to the next requests
        self.cuts: list[int] = []  # bytes of the shard after which the next answers break off
        self.resumes = True
        self.token: str | None = None
        self.file_store: FakeHub | None = None  # shards are redirected there
        self.listing: Any = None
        self.requests: list[tuple[str, dict[str, str]]] = []

    def requests_for(self, name: str) -> list[dict[str, str]]:
        return [headers for path, headers in self.requests if path.endswith("/" + name)]

    def list_files(self) -> Any:
        if self.listing is not None:
            return self.listing
        if self.kind == "huggingface":
            return {
                "id": REPO,
                "sha": "c0ffee",
                "siblings": [_hugging_face_entry(*item) for item in self.files.items()],
            }
        files = [
            {"Path": name, "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest(), "Type": "blob"}
            for name, data in self.files.items()
        ]
        return {"Data": {"Files": [*files, {"Path": "figures", "Size": 0, "Sha256": "", "Type": "tree"}]}}


def _hugging_face_entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
    entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if name.endswith(".safetensors"):
        entry["blobId"] = "of the pointer"
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        hub.requests.append((unquote(url.path), dict(self.headers)))
        if hub.statuses and (status := hub.statuses.pop(0)) != 200:
            return self.answer(status, b"", {"Retry-After": "0"})
        if hub.token is not None and hub.token not in self.headers.values():
            return self.answer(401, b"")
        listings = {
            "huggingface": f"/api/models/{REPO}/revision/main?blobs=true",
            "modelscope": f"/api/v1/models/{REPO}/repo/files?Revision=master&Recursive=true",
        }
        if self.path == listings[hub.kind]:
            return self.answer(200, json.dumps(hub.list_files()).encode())
        prefixes = {"huggingface": f"/{REPO}/resolve/c0ffee/", "modelscope": f"/models/{REPO}/resolve/master/"}
        name = unquote(url.path).removeprefix(prefixes[hub.kind])
        if name not in hub.files:
            return self.answer(404, b"")
        if hub.file_store is not None and name.endswith(".safetensors"):
            return self.answer(302, b"", {"Location": hub.file_store.url + self.path})
        return self.send_file(name, hub.served.get(name, hub.files[name]))

    def send_file(self, name: str, data: bytes) -> None:
        hub, status, headers = self.server, 200, {}
        if hub.resumes and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            status, headers = 206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            data = data[start:]
        cut = hub.cuts.pop(0) if hub.cuts and name == SHARD else len(data)
        self.answer(status, data, headers, cut)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None and cut < len(body):
            self.close_connection = True


def _serve(kind: str) -> Iterator[FakeHub]:
    with FakeHub(kind) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["huggingface", "modelscope"])
def hub(request: pytest.FixtureRequest) -> Iterator[FakeHub]:
    yield from _serve(request.param)


@pytest.fixture
def other_server(hub: FakeHub) -> Iterator[FakeHub]:
    yield from _serve(hub.kind)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No waiting, no proxy, no login of the person who runs the tests."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)


def fetch(hub: FakeHub, **options: Any) -> Path:
    return download(REPO, hub=hub.kind, endpoint=hub.url, **options)


def message(error: type[Glm4Error], hub: FakeHub, **options: Any) -> str:
    """The one line with which a download ends."""
    with pytest.raises(error) as caught:
        fetch(hub, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fresh_download(hub: FakeHub) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = fetch(hub, on_progress=lambda *progress: seen.append(progress))
    assert folder == Path("GLM-4-tiny")
    assert contents(folder) == NEEDED
    total = sum(map(len, NEEDED.values()))
    done = [entry[1] for entry in seen]
    assert {entry[2] for entry in seen} == {total}
    assert done == sorted(done)
    assert done[-1] == total


def test_second_run_fetches_only_what_is_missing_or_wrong(hub: FakeHub, tmp_path: Path) -> None:
    fetch(hub, target=tmp_path / "a" / "b")
    hub.requests.clear()
    assert fetch(hub, target=tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert len(hub.requests) == 1  # the listing
    damaged = bytearray(NEEDED[SHARD])
    damaged[1000] ^= 1
    (tmp_path / "a" / "b" / SHARD).write_bytes(damaged)
    (tmp_path / "a" / "b" / "LICENSE").unlink()
    fetch(hub, target=tmp_path / "a" / "b")
    assert contents(tmp_path / "a" / "b") == NEEDED
    assert len(hub.requests) == 4


def test_cut_connection_is_gone_on_with(hub: FakeHub) -> None:
    hub.cuts = [1_500_000, 100_000]
    assert contents(fetch(hub)) == NEEDED
    ranges = [headers.get("Range") for headers in hub.requests_for(SHARD)]
    assert ranges == [None, "bytes=1500000-", "bytes=1600000-"]


def test_interrupted_run_is_gone_on_with(hub: FakeHub, tmp_path: Path) -> None:
    hub.cuts = [1_000_000] + [0] * transfer.RETRIES
    text = message(DownloadError, hub)
    assert SHARD in text
    assert "run the same command again" in text
    folder = tmp_path / "GLM-4-tiny"
    assert (folder / (SHARD + ".incomplete")).read_bytes() == NEEDED[SHARD][:1_000_000]
    assert not (folder / SHARD).exists()
    hub.requests.clear()
    assert contents(fetch(hub)) == NEEDED
    assert [headers.get("Range") for headers in hub.requests_for(SHARD)] == ["bytes=1000000-"]


def test_server_that_cannot_resume(hub: FakeHub) -> None:
    hub.cuts, hub.resumes = [1_000_000], False
    assert contents(fetch(hub)) == NEEDED


@pytest.mark.parametrize("part", [b"wrong", NEEDED[SHARD] + b"too long"])
def test_part_of_another_file(hub: FakeHub, tmp_path: Path, part: bytes) -> None:
    """A part that cannot be right costs at most one more run."""
    folder = tmp_path / "GLM-4-tiny"
    folder.mkdir()
    (folder / (SHARD + ".incomplete")).write_bytes(part)
    if len(part) < len(NEEDED[SHARD]):
        assert SHARD in message(DownloadError, hub)
    assert contents(fetch(hub)) == NEEDED


@pytest.mark.parametrize("name", [SHARD, "config.json"])
@pytest.mark.parametrize("change", ["bytes", "longer"])
def test_wrong_bytes_are_removed_and_named(hub: FakeHub, tmp_path: Path, name: str, change: str) -> None:
    data = NEEDED[name]
    hub.served = {name: b"X" + data[1:] if change == "bytes" else data + b"X"}
    text = message(DownloadError, hub)
    assert text.startswith(f"{name}: {urlsplit(hub.url).netloc} sent the wrong bytes")
    names = {path.name for path in (tmp_path / "GLM-4-tiny").iterdir()}
    assert not names & {name, name + ".incomplete"}


def test_file_shorter_than_listed(hub: FakeHub, tmp_path: Path) -> None:
    hub.served = {SHARD: NEEDED[SHARD][:-1]}
    assert SHARD in message(DownloadError, hub)
    assert not (tmp_path / "GLM-4-tiny" / SHARD).exists()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_hub_is_asked_again(hub: FakeHub, status: int) -> None:
    hub.statuses = [status, status, 200, status]
    assert contents(fetch(hub)) == NEEDED


def test_busy_hub_is_not_asked_for_ever(hub: FakeHub, tmp_path: Path) -> None:
    hub.statuses = [503] * 100
    assert "answered 503" in message(DownloadError, hub)
    assert len(hub.requests) == 1 + transfer.RETRIES
    assert not (tmp_path / "GLM-4-tiny").exists()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not exist or needs a token: check the name, or pass --token"),
        (403, "may not be read: ask for access on the model's page"),
        (404, "does not exist: check the name and the revision"),
        (418, "cannot be had"),
    ],
)
def test_refusals(hub: FakeHub, tmp_path: Path, status: int, words: str) -> None:
    hub.statuses = [status]
    text = message(DownloadError, hub)
    for word in (f"model {REPO} (revision ", words, f"answered {status}"):
        assert word in text
    assert len(hub.requests) == 1
    assert not (tmp_path / "GLM-4-tiny").exists()


def test_another_revision(hub: FakeHub) -> None:
    assert "(revision v 2/3)" in message(DownloadError, hub, revision="v 2/3")


def test_token(hub: FakeHub) -> None:
    hub.token = "Bearer secret" if hub.kind == "huggingface" else "m_session_id=secret"
    assert "secret" not in message(DownloadError, hub)
    assert contents(fetch(hub, token="secret")) == NEEDED


def test_token_stays_with_the_hub(hub: FakeHub, other_server: FakeHub) -> None:
    hub.file_store = other_server
    hub.cuts = []
    other_server.cuts = [1_000_000]
    assert contents(fetch(hub, token="secret")) == NEEDED
    assert [headers.get("Range") for headers in other_server.requests_for(SHARD)] == [None, "bytes=1000000-"]
    assert not any("secret" in str(headers) for _, headers in other_server.requests)
    assert all("secret" in str(headers) for _, headers in hub.requests)


def test_login_is_not_sent_to_any_endpoint(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    fetch(hub)
    assert not any("secret" in str(headers) for _, headers in hub.requests)


@pytest.mark.parametrize("hub", ["huggingface"], indirect=True)
def test_endpoint_and_login_of_huggingface_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)  # what HF_ENDPOINT sets
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.token = "Bearer secret"
    assert contents(download(REPO)) == NEEDED


@pytest.mark.parametrize("hub", ["huggingface"], indirect=True)
def test_listing_is_what_huggingface_hub_reads(hub: FakeHub) -> None:
    info = huggingface_hub.HfApi(endpoint=hub.url, token=False).model_info(REPO, revision="main", files_metadata=True)
    ours = {file.name: file for file in HuggingFace(hub.url, None).list_files(REPO, "main")}
    assert info.siblings is not None
    assert {sibling.rfilename for sibling in info.siblings} == set(ours)
    for sibling in info.siblings:
        file = ours[sibling.rfilename]
        assert file.size == sibling.size
        assert file.digest.hex == (sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
        assert file.url == huggingface_hub.hf_hub_url(REPO, file.name, revision=info.sha, endpoint=hub.url)


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json", "a\n.json", ""]
)
def test_hostile_names(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.files[name] = b"{}"
    text = message(DownloadError, hub, target=tmp_path / "deep" / "model")
    assert repr(name) in text
    assert list(tmp_path.iterdir()) == []


def test_model_without_safetensors(hub: FakeHub, tmp_path: Path) -> None:
    del hub.files[SHARD]
    assert "has no safetensors weights" in message(DownloadError, hub)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("listing", [{}, [], {"sha": "x", "siblings": [{}]}, {"Data": {"Files": [{}]}}, {"Data": None}])
def test_strange_listing(hub: FakeHub, listing: Any) -> None:
    hub.listing = listing
    assert "check --endpoint" in message(DownloadError, hub)


def test_server_that_is_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", lambda value: "<html>")
    assert "did not answer with JSON" in message(DownloadError, hub)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(DownloadError, match=rf"127.0.0.1:{port} cannot be reached \(Connection refused\)"):
        download(REPO, endpoint=f"http://127.0.0.1:{port}")


def test_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT_SECONDS", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(DownloadError, match=rf"127.0.0.1:{port} cannot be reached \(timed out\)"):
            download(REPO, endpoint=f"http://127.0.0.1:{port}")


def test_disk_too_small(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    text = message(OutputError, hub)
    assert "are still to be fetched and 0.0 GB are free" in text
    assert list((tmp_path / "GLM-4-tiny").iterdir()) == []


def test_disk_full_while_writing(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "GLM-4-tiny").mkdir()
    (tmp_path / "GLM-4-tiny" / "config.json.incomplete").symlink_to("/dev/full")
    assert (
        message(OutputError, hub)
        == "GLM-4-tiny cannot be written: No space left on device; choose another folder with --to"
    )


def test_folder_that_holds_something_else(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert "holds other files (README.md)" in message(OutputError, hub, target=tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_target_is_a_file(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} cannot be written: File exists" in message(OutputError, hub, target=tmp_path / "file")


def test_two_downloads_into_one_folder(hub: FakeHub, tmp_path: Path) -> None:
    part = tmp_path / "GLM-4-tiny" / (SHARD + ".incomplete")
    part.parent.mkdir()
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is being written by another download" in message(DownloadError, hub)
    assert contents(fetch(hub)) == NEEDED


@pytest.mark.parametrize("repo", ["GLM-4-9B-0414", "a/b/c", "../x", "a/..", "a b/c", ""])
def test_name_that_is_none(repo: str) -> None:
    with pytest.raises(OptionError, match="is not the name of a model"):
        download(repo)


def test_unknown_hub() -> None:
    with pytest.raises(OptionError, match="unknown hub 'hugingface'; did you mean 'huggingface'"):
        download(REPO, hub="hugingface")


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "file:///etc", "https://", ""])
def test_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(OptionError, match="--endpoint"):
        download(REPO, endpoint=endpoint)


def test_command(hub: FakeHub, tmp_path: Path) -> None:
    arguments = [REPO, "--hub", hub.kind, "--endpoint", hub.url, "--to", str(tmp_path / "my model")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'my model'}\n"
    assert f"""glm4 generate -m '{tmp_path / "my model"}' "你好\"""" in result.stderr
    assert contents(tmp_path / "my model") == NEEDED


def test_command_leaves_errors_to_its_group(hub: FakeHub) -> None:
    hub.statuses = [404]
    with pytest.raises(DownloadError, match="does not exist"):
        CliRunner().invoke(command, [REPO, "--hub", hub.kind, "--endpoint", hub.url], catch_exceptions=False)
