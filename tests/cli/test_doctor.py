"""`glm4 doctor` beside what the system itself says."""

from __future__ import annotations

import json
import os
import platform
import socket
from pathlib import Path

import pytest
import torch
from programs import Bench

from glm4.errors import OptionError


def findings(bench: Bench) -> dict[str, dict[str, str]]:
    ran = bench.glm4("doctor", "--json")
    assert (ran.code, ran.err) == (0, "")
    return {finding["name"]: finding for finding in json.loads(ran.out)}


def test_finds_what_is_there(bench: Bench) -> None:
    found = findings(bench)
    assert found["Python"]["found"].startswith(platform.python_version())
    assert found["torch"]["found"].startswith(torch.__version__)
    assert f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable" in found["threads"]["found"]
    total = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    assert found["memory"]["found"].endswith(f" of {total:.1f} GiB free")
    assert "lo 127.0.0.1" in found["network"]["found"]
    assert {name for _, name in socket.if_nameindex()} >= {
        word.split()[0] for word in found["network"]["found"].split(", ")
    }
    assert ("CUDA" in found) != torch.cuda.is_available()


def test_says_what_is_missing(bench: Bench) -> None:
    bench.monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bench.monkeypatch.setattr("glm4.parallel.network.interfaces", lambda: {"lo": "127.0.0.1", "eth0": None})
    found = findings(bench)
    assert found["ray (optional)"] == {
        "name": "ray (optional)",
        "found": "",
        "advice": "glm4 serve --ray, glm4 batch --ray: pip install 'glm4[ray]'",
    }
    assert found["MindSpore"]["advice"]
    assert found["network"]["advice"] == "no interface but loopback: several machines cannot meet"


def test_a_check_that_fails_is_a_line_of_the_table(bench: Bench) -> None:
    def broken() -> None:
        raise OptionError("GLM4_CPU_ISA: 'avx9' is none of these")

    bench.monkeypatch.setattr("glm4.ops.cpu.library.kernels_summary", broken)
    found = findings(bench)
    assert found["CPU kernels"] == {
        "name": "CPU kernels",
        "found": "",
        "advice": "GLM4_CPU_ISA: 'avx9' is none of these",
    }
    assert "threads" in found


@pytest.mark.parametrize("width", ["60", "200"])
def test_table_has_every_line(bench: Bench, width: str) -> None:
    bench.monkeypatch.setenv("COLUMNS", width)
    ran = bench.glm4("doctor")
    assert ran.code == 0
    words = "".join(ran.out.split()).replace("│", "")
    assert [name for name in findings(bench) if name.split()[0] not in words] == []
