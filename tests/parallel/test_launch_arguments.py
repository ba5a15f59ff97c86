"""The four forms of msrun_launcher.sh, and what cannot be launched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY

from glm4.cli.msrun import launch_arguments
from glm4.errors import OptionError
from glm4.parallel.launch import LaunchOptions, program

CMD = "run_mindformer.py --predict_data='请介绍一下 北京' --a.b=c"
WORDS = [str(REPOSITORY / "run_mindformer.py"), "--predict_data=请介绍一下 北京", "--a.b=c"]
NINE = ("16", "8", "10.0.0.1", "8118", "1", "logs", "False", "300")


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ((), "--nproc 8"),
        (("4",), "--nproc 4"),
        (("1",), "--nproc 1"),
        (("2", "8118", "logs", "True", "300"), "--nproc 2 --port 8118 --log-dir logs --timeout 300"),
        (("2", "8118", "logs", "false", "300"), "--nproc 2 --port 8118 --log-dir logs --timeout 300 --no-join"),
        (
            NINE,
            "--nproc 8 --nnodes 2 --master-addr 10.0.0.1 --node-rank 1 --port 8118 --log-dir logs --timeout 300 "
            "--no-join",
        ),
    ],
)
def test_forms(words: tuple[str, ...], flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch_arguments([CMD, *words], REPOSITORY) == [*flags.split(), "--", *WORDS]


def test_a_script_here_comes_before_the_repositorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run_mindformer.py").touch()
    assert launch_arguments(["run_mindformer.py"], REPOSITORY)[-1] == "run_mindformer.py"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "0 arguments; 1, 2, 6 or 9 are understood"),
        ([CMD, "2", "8118"], "3 arguments; 1, 2, 6 or 9 are understood"),
        ([""], "CMD is empty"),
        (["run.py --a 'b"], "No closing quotation"),
        ([CMD, "2", "8118", "logs", "perhaps", "60"], "JOIN: 'perhaps' is neither True nor False"),
        ([CMD, "9", *NINE[1:]], "N 9 is not a multiple of LOCAL_N 8"),
        ([CMD, "two", *NINE[1:]], "N: 'two' is not a whole number"),
    ],
)
def test_forms_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        launch_arguments(words, REPOSITORY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 0}, "0 processes: start at least one"),
        ({"processes": 3}, "3 processes cannot be 2 on each machine"),
        ({"processes": 4, "port": 8118, "node_rank": 2}, "node rank 2 is not there: .* make 2 machines"),
        ({"node_rank": -1}, "node rank -1 is not there: .* make 1 machine, counted from 0"),
        ({"port": 70000}, "port 70000 is out of range"),
        ({"processes": 4}, "several machines need one port that all of them know"),
        ({"timeout": float("nan")}, "timeout nan is out of range"),
    ],
)
def test_numbers_that_do_not_fit(changes: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LaunchOptions(**{"command": ("a.py",), "processes": 2, "local_processes": 2} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["glm4 chat -m x", "-m glm4 chat -m x", "/usr/bin/python3 -m glm4 chat -m x"])
def test_commands_run_by_this_interpreter(command: str) -> None:
    assert program(command.split()) == [sys.executable, "-m", "glm4", "chat", "-m", "x"]


@pytest.mark.parametrize(
    ("command", "message"),
    [(["ls", "-l"], "'ls -l': give a Python script or a glm4 command"), (["no.py"], "no.py: no such script")],
)
def test_commands_that_are_none(command: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        program(command)


def test_the_shell_script_hands_all_on(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(REPOSITORY / "scripts" / "msrun_launcher.sh"), "a.py 'b", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, 'error: CMD "a.py \'b": No closing quotation\n')
