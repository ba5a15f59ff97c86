"""docs/server.md: its snippets run as they stand, and its lists are whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from serving import REPOSITORY, Server

from glm4.options import ServerOptions

PAGE = (REPOSITORY / "docs" / "server.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("language", "code"), SNIPPETS, ids=lambda value: value.split("\n")[0])
def test_snippets(server: Server, language: str, code: str) -> None:
    program = {"sh": ["sh", "-ec"], "python": [sys.executable, "-c"]}[language]
    assert "http://127.0.0.1:8000" in code
    code = code.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run([*program, code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "北京" in done.stdout


def test_every_option_and_its_default_are_listed() -> None:
    rows = dict(re.findall(r"(?m)^\| (`[a-z_`, ]+`) \| ([^|]*) \|", PAGE))
    listed = {name: default for names, default in rows.items() for name in re.findall(r"`(\w+)`", names)}
    assert set(listed) == {option.name for option in fields(ServerOptions)}
    for option in fields(ServerOptions):
        if option.default not in (None, ()) and option.name != "max_body":
            assert float(listed[option.name]) == option.default if isinstance(option.default, float) else True
            assert isinstance(option.default, float) or listed[option.name] == str(option.default)


def test_every_endpoint_is_listed(server: Server) -> None:
    described = json.loads(server.request("GET", "/openapi.json").read())["paths"]
    text = PAGE.replace("`…/count_tokens`", "`/v1/messages/count_tokens`")
    for path in described:
        if "{" not in path:
            assert re.search(rf"`(?:GET |POST )?{re.escape(path)}`", text), path
