"""Jobs on several machines: launchers on one machine's loopback, and in two network namespaces with a cable between."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from launching import REPOSITORY, Job, end_all, log, wait_until
from tiny import write_tiny_chat

from glm4.errors import EngineError
from glm4.parallel import machines
from glm4.parallel.machines import Machines, Member

SUM = """
import os, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor([10.0 ** dist.get_rank()])
dist.all_reduce(x)
print(x.item())
dist.destroy_process_group()
"""
FAIL = """
import os, sys, time
if os.environ["RANK"] == sys.argv[1]:
    print("error: no such folder", file=sys.stderr)
    sys.exit(3)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    end_all()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


def on_machine(
    number: int, port: str, text: str, local: str = "2", address: str = "127.0.0.1", seconds: str = "60", **more: tuple
) -> Job:
    """One of two launchers, which together start twice `local` ranks."""
    Path("job.py").write_text(text, encoding="utf-8")
    total = str(2 * int(local))
    return Job("job.py", total, local, address, port, str(number), f"logs-{number}", "True", seconds, **more)


def test_ranks_of_two_machines_meet() -> None:
    port = free_port()
    second, first = on_machine(1, port, SUM), on_machine(0, port, SUM)
    assert (first.finish().code, first.out) == (0, "1111.0\n")
    assert (second.finish().code, second.out) == (0, "")
    assert [log(rank, f"logs-{rank // 2}") for rank in range(4)] == ["1111.0\n"] * 4
    assert sorted(path.name for path in Path("logs-1").iterdir()) == ["scheduler_1.log", "worker_2.log", "worker_3.log"]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_fails_ends_the_job_on_both_machines(rank: int) -> None:
    port, text = free_port(), FAIL.replace("sys.argv[1]", repr(str(rank)))
    jobs = [on_machine(number, port, text) for number in range(2)]
    assert [job.finish().code for job in jobs] == [3, 3]
    here, there = jobs[rank // 2], jobs[1 - rank // 2]
    assert here.message.startswith(f"rank {rank} (process ")
    assert there.message == f"machine {rank // 2} ({socket.gethostname()}): {here.message}"
    assert here.left() == there.left() == []


def test_a_machine_that_does_not_come() -> None:
    first, second = (on_machine(number, free_port(), SUM, seconds="2") for number in range(2))
    assert (first.finish().code, second.finish().code) == (9, 9)
    assert first.message.startswith("machine 1 did not come within 2 s: start the same command there")
    assert second.message.startswith("machine 0 does not answer at 127.0.0.1:")


def test_machines_that_do_not_fit_together() -> None:
    port = free_port()
    first, second = on_machine(0, port, SUM), on_machine(1, port, SUM, local="1")
    assert first.finish().code == second.finish().code == 2
    assert "starts 1 of 2 processes" in first.message
    assert "starts 2 of 4 processes" in second.message


def test_two_machines_with_one_number() -> None:
    port = free_port()
    stay = "import time\ntime.sleep(5)"  # until all three have come
    jobs = [on_machine(0, port, stay, seconds="20"), *(on_machine(1, port, stay, seconds="20") for _ in range(2))]
    codes = sorted(job.finish().code for job in jobs)
    assert codes == [0, 0, 2]
    [refused] = [job for job in jobs if job.code == 2]
    assert refused.message == f"node rank 1 is {socket.gethostname()}'s already: give each machine its own"


def test_a_first_machine_elsewhere() -> None:
    done = on_machine(0, free_port(), SUM, address="192.0.2.1").finish()
    assert done.code == 2
    assert done.message.startswith("192.0.2.1 is not an address of this machine")


def test_a_launcher_that_is_killed_ends_the_other_machine() -> None:
    port, text = free_port(), "import time\nprint('here', flush=True)\ntime.sleep(100)"
    first, second = on_machine(0, port, text), on_machine(1, port, text)
    wait_until(lambda: log(0, "logs-0") and log(3, "logs-1"))
    first.process.kill()
    assert second.finish().code == 9
    assert second.message.startswith(f"machine 0 ({socket.gethostname()}) at 127.0.0.1 is lost: ")
    assert second.left() == []


def test_a_machine_that_falls_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers in one process; the second one shows no sign of life once they have met."""
    monkeypatch.setattr(machines, "_SILENCE", 1.0)
    monkeypatch.setattr(machines, "_INTERVAL", 0.05)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    first = Machines(Member(0, 2, 1, "a"), "127.0.0.1", listener, port, 20)
    second = Machines(Member(1, 2, 1, "b"), "127.0.0.1", None, port, 20)
    monkeypatch.setattr(second, "_watch", lambda: None)
    second._watcher = threading.Thread(target=time.sleep, args=(0,))
    meeting = threading.Thread(target=second.meet)
    meeting.start()
    first.meet()
    meeting.join()

    def lost() -> bool:
        try:
            first.check()
        except EngineError as error:
            assert str(error).startswith("machine 1 (b) is lost: ")
            return True
        return False

    wait_until(lost)


Cable = tuple[tuple[str, str], Callable[[], None]]


@pytest.fixture
def cable() -> Iterator[Cable]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, and a way to cut the cable between them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and ip")
    mark = secrets.token_hex(3)
    names = (f"glm4a{mark}", f"glm4b{mark}")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "veth0")
            for link in ("lo", "veth0"):
                ip("-n", name, "link", "set", link, "up")
        yield names, lambda: ip("-n", names[0], "link", "set", "veth0", "down")
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


def test_two_network_namespaces(cable: Cable) -> None:
    names, _ = cable
    first, second = (
        on_machine(number, "8118", SUM, address="10.77.0.1", inside=("ip", "netns", "exec", name))
        for number, name in enumerate(names)
    )
    assert (first.finish().code, first.out, first.err) == (0, "1111.0\n", "")
    assert (second.finish().code, second.err) == (0, "")


def answer_on_two_machines(names: tuple[str, str], model: Path, *flags: str) -> list[Job]:
    """`glm4 generate` with one rank in each namespace, which goes on until it is stopped."""
    prompt = ("generate", "从前", "-v", "-m", str(model), "--rank-timeout", "3", *flags)
    long = ("-o", "ignore_eos", "true", "-o", "max_new_tokens", "30000")
    where = ("--nproc", "1", "--nnodes", "2", "--master-addr", "10.77.0.1", "--port", "8118")
    return [
        Job(
            *(
                "launch",
                *where,
                "--node-rank",
                str(number),
                "--log-dir",
                f"logs-{number}",
                "--",
                "glm4",
                *prompt,
                *long,
            ),
            module="glm4",
            inside=("ip", "netns", "exec", name),
            stdin=subprocess.DEVNULL,
        )
        for number, name in enumerate(names)
    ]


def check_both_name_the_other(first: Job, second: Job) -> None:
    assert (first.finish().code, second.finish().code) == (9, 9)
    assert "rank 1 (pid " in first.message
    assert "rank 0 " in second.message
    assert first.left() == second.left() == []


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_a_cable_that_is_cut_in_the_middle_of_an_answer(cable: Cable, kind: str) -> None:
    """Both sides name the other one within the time limit."""
    names, cut = cable
    jobs = answer_on_two_machines(names, REPOSITORY / "demo" / "glm4-demo", f"--{kind}-parallel", "2")
    wait_until(lambda: len(log(0, "logs-0")) > 1000)
    cut()
    check_both_name_the_other(*jobs)


def test_a_cable_that_is_cut_while_the_ranks_load(cable: Cable, tmp_path: Path) -> None:
    """They quantise for a second or two, and each says before that what it computes with."""
    names, cut = cable
    large = write_tiny_chat(tmp_path / "large", num_hidden_layers=8, hidden_size=1024, intermediate_size=8192).path
    jobs = answer_on_two_machines(names, large, "--tensor-parallel", "2", "--quantization", "int4")
    wait_until(lambda: all("CPU kernels" in log(number, f"logs-{number}") for number in range(2)))
    cut()
    check_both_name_the_other(*jobs)
