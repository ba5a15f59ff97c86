"""The server, before it serves."""

from __future__ import annotations

import socket
from pathlib import Path

from error_cases.table import case
from programs import Bench, Ran


@case("the port is taken")
def _(bench: Bench) -> Ran:
    with socket.create_server(("127.0.0.1", 0)) as other:
        return bench.glm4("serve", "-m", "model", "--port", str(other.getsockname()[1]))


@case("the host is none of this machine's")
def _(bench: Bench) -> Ran:
    return bench.glm4("serve", "-m", "model", "--host", "nowhere.invalid")


@case("`serve --config` names a misspelt option")
def _(bench: Bench) -> Ran:
    Path("serve.yaml").write_text("prot: 8000\n", encoding="utf-8")
    return bench.glm4("serve", "-m", "model", "--config", "serve.yaml")


@case("`serve --config` names no file")
def _(bench: Bench) -> Ran:
    return bench.glm4("serve", "-m", "model", "--config", "serve.yaml")


@case("the file of API keys holds none")
def _(bench: Bench) -> Ran:
    Path("keys").write_text("# to come\n", encoding="utf-8")
    return bench.glm4("serve", "-m", "model", "--api-key-file", "keys")


@case("a certificate without its key")
def _(bench: Bench) -> Ran:
    return bench.glm4("serve", "-m", "model", "--tls-cert", "cert.pem")


@case("a certificate that is none")
def _(bench: Bench) -> Ran:
    Path("cert.pem").write_text("nothing\n", encoding="utf-8")
    return bench.glm4("serve", "-m", "model", "--tls-cert", "cert.pem", "--tls-key", "cert.pem")
