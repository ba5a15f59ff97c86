"""`glm4 doctor`: what this machine has for running a model, and what it lacks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from glm4.errors import Glm4Error
from glm4.files import one_line

_EXTRAS = {
    "transformers": "verify: compares a folder's logits with transformers'",
    "ray": "ray: glm4 serve --ray, glm4 batch --ray",
    "opentelemetry": "otel: traces of requests",
}
_DISTRIBUTIONS = {"opentelemetry": "opentelemetry-sdk"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table."""

    name: str
    found: str
    """What is there; empty where it is missing."""
    advice: str = ""
    """What is missing, and what to do about it."""


@click.command("doctor", short_help="what this machine has, and what is missing")
@click.option("--json", "as_json", is_flag=True, help="one JSON array in place of the table")
def command(as_json: bool) -> None:
    """Say what was found on this machine: Python and torch, cards, kernels, memory, disk, network, optional packages.

    Nothing is loaded or changed, and what is missing is no error: the exit code is 0.

    \b
    Examples:
      glm4 doctor
      glm4 doctor --json
    """
    findings = list(_findings())
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="glm4 doctor", title_justify="left")
    for heading in ("", "found", "missing, or worth knowing"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(finding.name, escape(finding.found) or "–", escape(finding.advice))
    Console(highlight=False).print(table)


def _findings() -> Iterator[Finding]:
    """All lines; one that cannot be found out says why."""
    for name, check in _CHECKS.items():
        try:
            found = check()
            yield from [found] if isinstance(found, Finding) else found
        except (Glm4Error, OSError, RuntimeError, ImportError) as error:
            yield Finding(name, "", one_line(error))


def _python() -> Finding:
    system = f"{platform.system()} {platform.machine()}"
    return Finding("Python", f"{platform.python_version()} ({sys.executable}), {system}")


def _glm4() -> Finding:
    import glm4

    return Finding("glm4", f"{glm4.__version__} ({Path(glm4.__file__).parent})")


def _torch() -> Finding:
    import torch

    backends = [name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")()]
    advice = "" if "gloo" in backends else "without gloo there are no several cards: install torch from PyPI"
    return Finding("torch", f"{torch.__version__}, collectives: {', '.join(backends) or 'none'}", advice)


def _cuda() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        advice = (
            f"torch is built for CUDA {built}, but no card or driver answers (nvidia-smi says more)"
            if built
            else "torch is the CPU build; with a card, install the CUDA build from pytorch.org"
        )
        return [Finding("CUDA", "", advice)]
    findings = []
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"{of.name}, {_size(free)} of {_size(total)} free, compute capability {of.major}.{of.minor}"
        advice = "" if torch.cuda.is_bf16_supported() else "no bfloat16: use --dtype float32"
        findings.append(Finding(f"CUDA card {index}", text, advice))
    return findings


def _npu() -> Finding:
    home = os.environ.get("ASCEND_HOME_PATH") or "/usr/local/Ascend/ascend-toolkit/latest"
    cann = Path(home).is_dir()
    if (version := _version("torch_npu")) is None:
        has = f"CANN in {home}" if cann else ""
        return Finding("Ascend (torch_npu, CANN)", has, "only for Ascend cards: install CANN and torch_npu")
    import torch_npu

    cards = torch_npu.npu.device_count() if torch_npu.npu.is_available() else 0
    advice = "" if cann and cards else f"{'no card answers' if cann else f'no CANN in {home}: source its set_env.sh'}"
    return Finding("Ascend (torch_npu, CANN)", f"torch_npu {version}, {cards} cards", advice)


def _mindspore() -> Finding:
    version = _version("mindspore")
    return Finding("MindSpore", version or "", "" if version else "only for the MindSpore runner")


def _kernels() -> Finding:
    from glm4.ops.cpu.library import kernels_summary, load

    summary = kernels_summary()
    return Finding("CPU kernels", summary, "" if load() else "install the package again, with a C++ compiler there")


def _threads() -> Finding:
    usable, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    limits = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    text = f"{usable} of {all_cores} cores usable" + "".join(f", {name}={value}" for name, value in limits.items())
    return Finding("threads", text)


def _memory() -> Finding:
    import torch

    from glm4.device import free_memory

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Finding("memory", f"{_size(free_memory(torch.device('cpu')))} of {_size(total)} free")


def _huge_pages() -> Finding:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = file.read_text(encoding="ascii").partition("[")[2].partition("]")[0] if file.exists() else ""
    if mode in ("always", "madvise"):
        return Finding("huge pages", f"transparent, {mode}")
    return Finding("huge pages", mode, f"reading weights takes longer without them: echo madvise > {file} (as root)")


def _shared_memory() -> Finding:
    usage = shutil.disk_usage("/dev/shm")
    few = usage.free < 64 * 2**20
    advice = "several ranks on one CPU need some: docker run --shm-size 1g" if few else ""
    return Finding("shared memory (/dev/shm)", f"{_size(usage.free)} of {_size(usage.total)} free", advice)


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    return Finding("disk (this folder)", f"{_size(usage.free)} of {_size(usage.total)} free")


def _network() -> Finding:
    from glm4.parallel.network import interfaces

    addresses = interfaces()
    text = ", ".join(f"{name} {address}" for name, address in addresses.items() if address)
    others = any(address for name, address in addresses.items() if name != "lo")
    return Finding("network", text, "" if others else "no interface but loopback: several machines cannot meet")


def _extras() -> list[Finding]:
    findings = []
    for module, what in _EXTRAS.items():
        extra, _, use = what.partition(": ")
        version = _version(module, _DISTRIBUTIONS.get(module, module))
        advice = "" if version else f"{use}: pip install 'glm4[{extra}]'"
        findings.append(Finding(f"{module} (optional)", version or "", advice))
    return findings


def _version(module: str, distribution: str = "") -> str | None:
    """What is installed, without importing it."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(distribution or module)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


_CHECKS: dict[str, Callable[[], Finding | list[Finding]]] = {
    "Python": _python,
    "glm4": _glm4,
    "torch": _torch,
    "CUDA": _cuda,
    "Ascend (torch_npu, CANN)": _npu,
    "MindSpore": _mindspore,
    "CPU kernels": _kernels,
    "threads": _threads,
    "memory": _memory,
    "huge pages": _huge_pages,
    "shared memory (/dev/shm)": _shared_memory,
    "disk (this folder)": _disk,
    "network": _network,
    "optional packages": _extras,
}
