"""`glm4 serve`: where options come from, and what it says of bad ones before it loads anything."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click.testing
import pytest
from serving import start_server

from glm4.cli.main import main
from glm4.cli.serve import command
from glm4.options import ServerOptions


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GLM4_MODEL", "GLM4_API_KEY", "GLM4_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and last line of a command that fails."""
    with pytest.raises(SystemExit) as left:
        main(["serve", *argv])
    assert isinstance(left.value.code, int)
    return left.value.code, capsys.readouterr().err.splitlines()[-1]


def test_every_option_has_its_flag_but_the_secret_ones() -> None:
    text = click.testing.CliRunner().invoke(command, ["--help"]).output
    for option in fields(ServerOptions):
        flag = f"--{option.name.replace('_', '-')}"
        assert (f"  {flag} " in text) is not option.metadata.get("secret", False), flag


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("prot: 1\n", "config.yaml:1: unknown option 'prot'; did you mean 'port'?"),
        ("port: 1\nport: 2\n", "config.yaml:2: port stands twice: keep one of the two"),
        ("port: {a: 1}\n", "config.yaml:1: port takes a value, or a list of them"),
        ("port: [1\n", "config.yaml is not valid YAML: "),
        ("# nothing\n", "config.yaml holds no options: write one a line, such as port: 8000"),
        ("port: many\n", "port: 'many' is not a whole number"),
        ("port: 70000\n", "port: 70000 is out of range (at least 0, at most 65535)"),
        ("max_body: much\n", "max_body: 'much' is not an amount of memory"),
        ("max_body: 50%\n", "max_body: '50%' is not a number of bytes"),
        ("tls_cert: a\n", "tls_cert and tls_key belong together: give both, or neither"),
        ("port: 1\n", "no model: give its folder with -m DIR, or set GLM4_MODEL"),
    ],
)
def test_bad_config_files(config: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(config, encoding="utf-8")
    code, line = fail(capsys, "--config", "config.yaml")
    assert line.startswith(f"error: {message}")
    assert code == 2


def test_a_config_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(capsys, "--config", "no.yaml") == (
        2,
        "error: no.yaml cannot be read: No such file or directory; give --config another file",
    )


def test_what_is_wrong_is_said_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    """The folder would be another error."""
    Path("empty").write_text("# none\n", encoding="utf-8")
    Path("binary").write_bytes(b"\xff")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for flags, message in {
            ("--port", port): f"127.0.0.1:{port}: Address already in use; choose another --host or --port",
            ("--host", "256.0.0.1"): "256.0.0.1:8000: ",
            ("--api-key-file", "empty"): "api_key_file: empty holds no key: write one a line",
            ("--api-key-file", "binary"): "api_key_file: binary cannot be read (",
            ("--api-key-file", "absent"): "api_key_file: absent cannot be read (",
            ("--tls-cert", "empty", "--tls-key", "absent"): "absent is no file: give --tls-cert and --tls-key",
            ("--tls-cert", "empty", "--tls-key", "empty"): "empty and empty are no certificate and its key: ",
        }.items():
            code, line = fail(capsys, "-m", "no-such-model", *flags)
            assert line.startswith(f"error: {message}")
            assert code == 2


def test_a_folder_that_is_no_model() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "glm4", "serve", "-m", "no"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: 'no' is not there")


def test_an_open_door_is_said() -> None:
    server = start_server("--host", "0.0.0.0")
    assert any(line.startswith("anyone who reaches 0.0.0.0 can use this server") for line in server.log)
    assert server.stop() == 0
