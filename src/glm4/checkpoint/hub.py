"""Model folders from a hub: Hugging Face or ModelScope, resumable, every file checked by size and hash."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from glm4.checkpoint.transfer import PARTIAL_SUFFIX, Digest, RemoteFile, fetch_file, fetch_json
from glm4.errors import DownloadError, OptionError, OutputError
from glm4.options import nearest

Progress = Callable[[str, int, int], None]
"""Hears what is going on (a file name, or "checking" one), how many bytes are there, and how many there will be."""

_NEEDED = re.compile(r"(?!consolidated)[^/]+\.(safetensors|json|jinja|txt)|(LICENSE|NOTICE|README)[^/]*")
"""What running a model takes, and its papers. "consolidated" files repeat the weights in another layout."""


def download(
    repo: str,
    target: Path | None = None,
    *,
    hub: str = "huggingface",
    endpoint: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Path:
    """Fetch model `repo` ("owner/name") into folder `target`, by default one named like the model, here.

    Files that are there and right are kept, files begun are gone on with. Returns the folder.

    Raises OptionError for an argument that cannot be right, DownloadError for a hub that cannot be reached, refuses
    or sends wrong bytes, OutputError where the folder cannot be written or the disk is too small.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo, re.ASCII):
        raise OptionError(f"{repo!r} is not the name of a model: write it like zai-org/GLM-4-9B-0414")
    if hub not in HUBS:
        raise OptionError(f"unknown hub {hub!r}{nearest(hub, HUBS)}")
    if endpoint is not None and (urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc):
        raise OptionError(f"--endpoint {endpoint!r} is not an address: write it like https://huggingface.co")
    site = HUBS[hub](endpoint, token)
    files = _needed(site.list_files(repo, revision or site.default_revision), repo)
    target = Path(repo.rpartition("/")[2]) if target is None else target
    try:
        _prepare(target)
        _fetch_missing(files, site.credentials, target, on_progress)
    except OSError as error:
        raise OutputError(
            f"{error.filename or target} cannot be written: {error.strerror}; choose another folder with --to"
        ) from error
    return target


class Hub(Protocol):
    """How one hub lists a model's files and lets us in."""

    default_revision: str
    credentials: dict[str, str]

    def __init__(self, endpoint: str | None, token: str | None) -> None: ...

    def list_files(self, repo: str, revision: str) -> list[RemoteFile]:
        """All files of a model. Raises DownloadError."""
        ...


class HuggingFace:
    """huggingface.co, what HF_ENDPOINT names, or a mirror of it."""

    default_revision = "main"

    def __init__(self, endpoint: str | None, token: str | None) -> None:
        from huggingface_hub import constants, get_token

        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        token = token or (get_token() if endpoint is None else None)  # a login is not for any server one may name
        self.credentials = {"Authorization": f"Bearer {token}"} if token else {}

    def list_files(self, repo: str, revision: str) -> list[RemoteFile]:
        url = f"{self.endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
        answer = fetch_json(url, self.credentials, f"model {repo} (revision {revision})")
        try:
            # The commit, not the branch: all files are of one state even if somebody pushes meanwhile.
            base = f"{self.endpoint}/{repo}/resolve/{quote(answer['sha'], safe='')}/"
            return [self._remote_file(entry, base) for entry in answer["siblings"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _strange_listing(self.endpoint, error) from error

    def _remote_file(self, entry: dict[str, Any], base: str) -> RemoteFile:
        name, lfs = entry["rfilename"], entry.get("lfs")
        digest = Digest("sha256", lfs["sha256"]) if lfs else Digest("git-sha1", entry["blobId"])
        return RemoteFile(name, base + quote(name), int(entry["size"]), digest)


class ModelScope:
    """modelscope.cn, or another server with its interface."""

    default_revision = "master"

    def __init__(self, endpoint: str | None, token: str | None) -> None:
        self.endpoint = (endpoint or "https://www.modelscope.cn").rstrip("/")
        token = token or (os.environ.get("MODELSCOPE_API_TOKEN") if endpoint is None else None)
        self.credentials = {"Cookie": f"m_session_id={token}"} if token else {}

    def list_files(self, repo: str, revision: str) -> list[RemoteFile]:
        url = f"{self.endpoint}/api/v1/models/{repo}/repo/files?Revision={quote(revision, safe='')}&Recursive=true"
        answer = fetch_json(url, self.credentials, f"model {repo} (revision {revision})")
        base = f"{self.endpoint}/models/{repo}/resolve/{quote(revision, safe='')}/"
        try:
            return [
                RemoteFile(entry["Path"], base + quote(entry["Path"]), entry["Size"], Digest("sha256", entry["Sha256"]))
                for entry in answer["Data"]["Files"]
                if entry["Type"] != "tree"
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise _strange_listing(self.endpoint, error) from error


HUBS: dict[str, type[Hub]] = {"huggingface": HuggingFace, "modelscope": ModelScope}


def _strange_listing(endpoint: str, error: Exception) -> DownloadError:
    return DownloadError(f"{endpoint} lists the files in a way that is not known here ({error!r}): check --endpoint")


def _needed(files: Iterable[RemoteFile], repo: str) -> list[RemoteFile]:
    """Those of the files that are wanted, config.json first: it tells a later run whose folder this is."""
    files = list(files)
    for file in files:
        if not _is_safe(file.name):
            raise DownloadError(f"{repo} lists a file {file.name!r}, which would land outside the folder: not fetched")
    needed = {file.name: file for file in files if _NEEDED.fullmatch(file.name)}
    if not any(name.endswith(".safetensors") for name in needed):
        raise DownloadError(f"{repo} has no safetensors weights ({len(files)} other files): choose another model")
    return sorted(needed.values(), key=lambda file: (file.name != "config.json", file.name))


def _is_safe(name: str) -> bool:
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not any(part in ("", ".", "..") for part in parts)


def _prepare(target: Path) -> None:
    """Make the folder, or make sure that it is a model's: files of the same names in others would be replaced."""
    target.mkdir(parents=True, exist_ok=True)
    names = [entry.name for entry in target.iterdir()]
    if names and not any(name == "config.json" or name.endswith(PARTIAL_SUFFIX) for name in names):
        raise OutputError(f"{target} holds other files ({min(names)}): choose an empty or a new folder with --to")


def _fetch_missing(
    files: list[RemoteFile], credentials: Mapping[str, str], target: Path, on_progress: Progress
) -> None:
    total, done, missing = sum(file.size for file in files), 0, []
    for file in files:
        on_progress(f"checking {file.name}", done, total)
        if _is_complete(file, target / file.name):
            done += file.size
        else:
            missing.append(file)
    _check_space(missing, target)
    for file in missing:
        fetch_file(file, credentials, target, _counted_from(done, total, file.name, on_progress))
        done += file.size
        on_progress(file.name, done, total)


def _counted_from(done: int, total: int, name: str, on_progress: Progress) -> Callable[[int], None]:
    return lambda position: on_progress(name, done + position, total)


def _is_complete(file: RemoteFile, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == file.size and file.digest.matches(path)


def _check_space(missing: list[RemoteFile], target: Path) -> None:
    begun = (target / (file.name + PARTIAL_SUFFIX) for file in missing)
    needed = sum(file.size for file in missing) - sum(part.stat().st_size for part in begun if part.is_file())
    free = shutil.disk_usage(target).free
    if needed > free:
        raise OutputError(
            f"{target}: {needed / 1e9:,.1f} GB are still to be fetched and {free / 1e9:,.1f} GB are free: "
            "make room, or choose another disk with --to"
        )
