"""Every command in the docs is run, on the demo model; the two READMEs say the same commands; links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from glm4.cli.main import cli

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "demo" / "glm4-demo"
DOCS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    """Shell commands, continued lines joined, comments dropped."""
    lines = "".join(blocks(document, "shell")).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := " ".join(shlex.split(line, comments=True, posix=False)))]


ALL = sorted({command for document in DOCS for command in commands(document)})


def run(command: str, folder: Path, standard_input: str = "") -> subprocess.CompletedProcess[str]:
    """Run one command of the docs in `folder`, the demo model in place of /path/hf_dir."""
    here = REPOSITORY
    command = command.replace("/path/hf_dir", shlex.quote(str(DEMO)))
    command = re.sub(r"\b(configs|docs|scripts)/", rf"{here}/\1/", command)
    command = command.replace("python run_mindformer.py", f"{sys.executable} {here}/run_mindformer.py")
    command = re.sub(
        r"\bglm4 (?=generate|chat|batch|bench|plan|quantize|verify|download|launch|doctor|completion|')",
        f"{sys.executable} -m glm4 ",
        command,
    )
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, input=standard_input, capture_output=True, text=True, timeout=300
    )


def test_there_are_commands() -> None:
    assert len(ALL) >= 12


@pytest.mark.parametrize("command", ALL)
def test_command(command: str, tmp_path: Path) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        # The recipes would run the tests, or train, again: see that the targets are there and take these values.
        done = subprocess.run(["make", "-n", *words], cwd=REPOSITORY, capture_output=True, text=True)
    elif words[0] == "download":
        # No hub here (tests/checkpoint has small ones): the arguments must be understood.
        assert CliRunner().invoke(cli, ["download", *words[1:], "--help"]).exit_code == 0
        return
    else:
        done = run(command, tmp_path, standard_input="你好\n" if "chat" in words else "")
    assert done.returncode == 0, done.stderr
    assert done.stdout or done.stderr


def test_run_mindformer_writes_its_result(tmp_path: Path) -> None:
    results = []
    for command in [c for c in commands(REPOSITORY / "README.md") if "--predict_batch_size" in c]:
        done = run(command, tmp_path)
        assert done.stdout.startswith("'text_generation_text': [好的，为您介绍一下北京：北京，简称“京”，是中国的首都")
        results.append((tmp_path / "text_generation_result.txt").read_text(encoding="utf-8"))
    one_card, two_cards = results
    assert one_card == two_cards


NEED_A_SERVER = "server.md"
"""Its blocks are run by tests/server/test_server_page.py, which has one."""


@pytest.mark.parametrize("document", [path for path in DOCS if path.name != NEED_A_SERVER], ids=lambda path: path.name)
def test_python_blocks_run(document: Path, tmp_path: Path) -> None:
    for code in blocks(document, "python"):
        code = code.replace("/path/hf_dir", str(DEMO))
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "北京" in done.stdout


def test_both_readmes_have_the_same_commands() -> None:
    def shapes(name: str) -> list[str]:
        return [re.sub(r"'[^']*'", "'…'", command) for command in commands(REPOSITORY / name)]

    assert shapes("README.md") == shapes("README.zh.md")


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
