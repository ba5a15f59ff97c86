"""The server's life: load, listen, and drain when it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from glm4.engine.served_model import ServedModel
from glm4.errors import EngineError, OptionError
from glm4.options import ServerOptions
from glm4.server.app import create_app
from glm4.server.gate import read_keys

log = logging.getLogger("glm4.server")

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _Server(uvicorn.Server):
    """Drains at the first signal: it still listens then, and says that it takes no more; leaves at the second."""

    def __init__(self, config: uvicorn.Config, llm: ServedModel, drain_timeout: float) -> None:
        super().__init__(config)
        self._llm, self._drain_timeout = llm, drain_timeout
        self._draining: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's handler of SIGTERM and SIGINT."""
        self.interrupted |= sig == signal.SIGINT
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        log.info("stopping: running requests get %g s to end; stop again to end them now", self._drain_timeout)
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await asyncio.wait_for(self._llm.drain(), self._drain_timeout)
        except TimeoutError:
            log.warning("some requests did not end within %g s: they are aborted", self._drain_timeout)
            self.force_exit = True
        self.should_exit = True

    def address(self) -> str:
        """Where it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"{'https' if self.config.is_ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def take_address(options: ServerOptions) -> socket.socket:
    """The socket to listen on, and a look at the files of keys and certificates: before a model is loaded.

    Raises OptionError for an address that cannot be had, and files that cannot be used.
    """
    read_keys(options)
    if options.tls_cert is not None:
        _check_certificate(options.tls_cert, options.tls_key)
    where = f"{options.host}:{options.port}"
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OptionError(f"{where}: {error.strerror or error}; choose another --host or --port") from error
    return listener


def _check_certificate(cert: str, key: str | None) -> None:
    for file in filter(None, (cert, key)):
        if not Path(file).is_file():
            raise OptionError(f"{file} is no file: give --tls-cert and --tls-key the certificate and its key")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except OSError as error:
        raise OptionError(f"{cert} and {key} are no certificate and its key: {error.strerror}") from error


async def serve(llm: ServedModel, options: ServerOptions, listener: socket.socket) -> None:
    """Serve a started `llm` until SIGTERM or SIGINT, then finish what runs. Raises KeyboardInterrupt after SIGINT.

    Raises EngineError when the engine has died for good.
    """
    config = uvicorn.Config(
        create_app(llm, options),
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        timeout_graceful_shutdown=5,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # the log has its own lines
    server = _Server(config, llm, options.drain_timeout)
    if options.host not in _LOOPBACK and not (options.api_key or options.api_key_file):
        log.warning("anyone who reaches %s can use this server: set GLM4_API_KEY or --api-key-file", options.host)
    watcher = asyncio.create_task(_watch(server, llm))
    try:
        await server.serve([listener])
    finally:
        watcher.cancel()
    if llm.health == "dead":
        raise EngineError("the engine has died for good: the log above says why; start the server again")
    if server.interrupted:
        raise KeyboardInterrupt


async def _watch(server: _Server, llm: ServedModel) -> None:
    """Say where the server listens, and end it when its engine is dead."""
    while not server.started:
        await asyncio.sleep(0.01)
    print(f"ready: {server.address()}", file=sys.stderr, flush=True)
    while llm.health != "dead":
        await asyncio.sleep(0.2)
    server.should_exit = True
