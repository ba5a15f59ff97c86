"""Jobs on one machine: what ranks are told and say, how jobs end, and that nothing is left of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import REPOSITORY, SECONDS, Job, end_all, log, wait_until

from glm4.parallel.network import FREE_PORTS

ROUNDS = int(os.environ.get("GLM4_LAUNCH_ROUNDS", "1"))
"""Three starts and stops each."""
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GROUP_RANK", "GROUP_WORLD_SIZE")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    end_all()


def script(text: str) -> str:
    """A script, which knows its `rank`; its name."""
    begin = "import os, signal, sys, time\nfrom pathlib import Path\nrank = int(os.environ['RANK'])\n"
    Path("job.py").write_text(begin + textwrap.dedent(text), encoding="utf-8")
    return "job.py"


def test_ranks_are_told_what_torchrun_tells_them() -> None:
    job = script(
        f"""
        import json
        name = f"{{sys.argv[1]}}-{{rank}}.json"
        Path(name).write_text(json.dumps({{name: os.environ[name] for name in {TOLD}}}))
        """
    )
    ours = Job(f"{job} ours", "2").finish()
    assert (ours.code, ours.out, ours.err) == (0, "", "")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    subprocess.run([*torchrun, job, "theirs"], check=True, capture_output=True, timeout=SECONDS)
    for rank in (0, 1):
        theirs = json.loads(Path(f"theirs-{rank}.json").read_text())
        assert json.loads(Path(f"ours-{rank}.json").read_text()) == theirs | {"MASTER_ADDR": "127.0.0.1"}


def test_torch_distributed_starts_from_the_environment() -> None:
    job = script(
        """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        x = torch.tensor([10.0 ** rank])
        dist.all_reduce(x)
        print(x.item())
        dist.destroy_process_group()
        """
    )
    done = Job(job, "3").finish()
    assert (done.code, done.out) == (0, "111.0\n")
    assert [log(rank) for rank in range(3)] == ["111.0\n"] * 3


def test_one_process() -> None:
    done = Job(script("print(os.environ['WORLD_SIZE'])"), "1").finish()
    assert (done.code, done.out) == (0, "1\n")


def test_the_first_rank_is_shown_as_it_speaks_and_only_it_reads() -> None:
    job = script(
        """
        print(f"{rank} begins")
        print(f"{rank} has no doubt", file=sys.stderr)
        while not Path("heard").exists():
            time.sleep(0.01)
        print(f"{rank} reads", sys.stdin.read())
        """
    )
    running = Job(job, "2")
    assert running.process.stdout is not None
    assert running.process.stdout.readline() == "0 begins\n"
    Path("heard").touch()
    done = running.finish("好")
    assert (done.code, done.out, done.err) == (0, "0 reads 好\n", "0 has no doubt\n")
    assert log(0) == "0 begins\n0 has no doubt\n0 reads 好\n"
    assert log(1) == "1 begins\n1 has no doubt\n1 reads \n"
    assert "all ranks have ended" in Path("output/msrun_log/scheduler.log").read_text("utf-8")


def test_a_rank_that_fails_ends_the_job() -> None:
    job = script(
        """
        if rank == 1:
            print("looked everywhere")
            print("error: no such folder", file=sys.stderr)
            sys.exit(3)
        time.sleep(100)
        """
    )
    done = Job(job, "2").finish()
    assert done.code == 3
    assert re.fullmatch(
        r"rank 1 \(process \d+\) ended with exit code 3: no such folder; its log: output/msrun_log/worker_1.log",
        done.message,
    )
    assert "\n  looked everywhere\n  error: no such folder\n" in done.err
    assert done.left() == []
    assert done.message in Path("output/msrun_log/scheduler.log").read_text("utf-8")


@pytest.mark.parametrize(("end", "code"), [("sys.exit(77)", 1), ("1 / 0", 1), ("sys.exit(9)", 9), ("os.abort()", 1)])
def test_exit_codes(end: str, code: int) -> None:
    done = Job(script(f"if rank == 0:\n    {end}\ntime.sleep(100)"), "2").finish()
    assert done.code == code
    assert done.message.startswith("rank 0 ")


def test_a_rank_that_was_killed_is_named_before_one_that_lost_it() -> None:
    job = script(
        """
        Path(f"pid-{rank}").write_text(str(os.getpid()))
        while not Path("killed").exists():
            time.sleep(0.01)
        if rank == 0:
            sys.exit(9)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    running = Job(job, "2")
    wait_until(lambda: Path("pid-1").exists())
    Path("killed").touch()
    done = running.finish()
    assert done.code == 1
    assert done.message.startswith(f"rank 1 (process {Path('pid-1').read_text()}) was killed by SIGKILL")


@pytest.mark.parametrize(
    "deaf", ["signal.signal(signal.SIGTERM, signal.SIG_IGN)", "os.kill(os.getpid(), signal.SIGSTOP)"]
)
def test_a_rank_that_does_not_listen_is_ended_too(deaf: str) -> None:
    job = script(
        f"""
        if rank == 0:
            while not Path("deaf").exists():
                time.sleep(0.01)
            sys.exit(5)
        Path("deaf").touch()
        {deaf}
        time.sleep(100)
        """
    )
    done = Job(job, "2").finish()
    assert (done.code, done.left()) == (5, [])


def test_what_a_rank_has_started_ends_with_it() -> None:
    job = script(
        """
        import subprocess
        child = subprocess.Popen(["sleep", "100"])
        Path("child").write_text(str(child.pid))
        sys.exit(1)
        """
    )
    done = Job(job, "1").finish()
    assert (done.code, done.left()) == (1, [])
    assert Path("child").read_text()


@pytest.mark.parametrize(
    ("number", "code", "message"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")]
)
def test_a_signal_ends_all(number: signal.Signals, code: int, message: str) -> None:
    running = Job(script("print('here')\ntime.sleep(100)"), "2")
    wait_until(lambda: log(0) and log(1))
    running.process.send_signal(number)
    done = running.finish()
    assert (done.code, done.message, done.left()) == (code, message, [])


def test_ranks_end_with_a_launcher_that_is_killed() -> None:
    running = Job(script("print('here')\ntime.sleep(100)"), "2")
    wait_until(lambda: log(0) and log(1))
    assert len(running.left()) == 3
    running.process.kill()
    running.finish()
    wait_until(lambda: not running.left())


def test_in_the_background() -> None:
    job = script("while not Path('go').exists():\n    time.sleep(0.01)\nprint('gone')")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    done = Job(job, "2", str(port), "logs", "False", "60").finish()
    started = re.fullmatch(r"started in the background as process (\d+) \(kill \1 stops it\); logs: logs\n", done.out)
    assert started and done.code == 0
    assert int(started[1]) in done.left()
    Path("go").touch()
    wait_until(lambda: not done.left())
    assert (log(0, "logs"), log(1, "logs")) == ("gone\n", "gone\n")
    assert "all ranks have ended" in Path("logs/scheduler.log").read_text("utf-8")


def test_a_taken_port_is_named_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = Job(script(""), "2", str(port), "logs", "True", "60").finish()
    assert done.code == 2
    assert done.message.startswith(f"port {port} is taken by process {os.getpid()} (")
    assert not Path("logs").exists()


def test_jobs_without_a_port_take_different_ones_and_hold_them() -> None:
    job = script("print(os.environ['MASTER_PORT'])\ntime.sleep(100)")
    jobs = [
        Job("launch", "--nproc", "1", "--log-dir", f"logs-{number}", "--", job, module="glm4") for number in range(2)
    ]
    wait_until(lambda: all(log(0, f"logs-{number}").strip() for number in range(2)))
    first, second = (int(log(0, f"logs-{number}")) for number in range(2))
    assert first != second
    assert {first, second} <= set(FREE_PORTS)
    refused = Job(job, "1", str(first), "logs", "True", "60").finish()
    assert refused.message.startswith(f"port {first} is taken by process {jobs[0].process.pid} (")
    for running in jobs:
        running.process.send_signal(signal.SIGTERM)
        assert running.finish().left() == []


def test_degrees_that_do_not_fit_are_said_before_anything_starts() -> None:
    demo = REPOSITORY / "demo" / "glm4-demo"
    flags = (
        f"--config configs/glm4/predict_glm4.yaml --pretrained_model_dir {demo} --predict_data hi --use_parallel True"
    )
    done = Job(f"run_mindformer.py {flags} --parallel_config.model_parallel 2", "3").finish()
    assert done.code == 2
    assert done.message.startswith("the parallel degrees multiply to 2, but the number of processes (WORLD_SIZE) is 3")
    assert not Path("output").exists()


def test_logs_that_cannot_be_written() -> None:
    Path("logs").touch()
    done = Job(script(""), "1", "0", "logs", "True", "60").finish()
    assert done.code == 2
    done = Job("launch", "--nproc", "1", "--log-dir", "logs", "--", script(""), module="glm4").finish()
    assert (done.code, done.message) == (7, "logs cannot hold the logs: File exists; give another folder")


def test_rounds_leave_nothing() -> None:
    """Ports, processes and shared memory; jobs that end well, fail, and are stopped, in turn, all on one port."""
    job = script(
        "print('here')\nif sys.argv[1] == 'fail':\n    sys.exit(5)\nif sys.argv[1] == 'stay':\n    time.sleep(100)"
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    before = set(Path("/dev/shm").iterdir())
    for number, (word, code) in enumerate((("end", 0), ("fail", 5), ("stay", 143)) * ROUNDS):
        logs = f"logs-{number}"
        running = Job(f"{job} {word}", "2", port, logs, "True", "60")
        if word == "stay":
            wait_until(lambda logs=logs: log(0, logs))
            running.process.send_signal(signal.SIGTERM)
        done = running.finish()
        assert (done.code, done.left()) == (code, [])
    assert {path for path in Path("/dev/shm").iterdir() if "torch" in path.name} <= before
