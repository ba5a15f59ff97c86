"""Addresses, ports and network interfaces of this machine, as a launcher needs them."""

from __future__ import annotations

import errno
import fcntl
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from glm4.errors import OptionError

FREE_PORTS = range(50000, 65536)
"""Where a port is looked for when none is given."""

_TRIES = 100
_LISTENING = "0A"
_SIOCGIFADDR = 0x8915


def listen(address: str, port: int | None) -> socket.socket:
    """A socket that listens on `port` of `address`, or on a free one of FREE_PORTS.

    It is held from then on, so nobody can take the port before it is used. Raises OptionError for an address that is
    not this machine's, and for a port that is taken, with the process that holds it.
    """
    candidates = [port] if port is not None else random.sample(FREE_PORTS, _TRIES)
    for candidate in candidates:
        family, *_, place = _resolve(address, candidate)
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place)
            listener.listen(128)
        except OSError as error:
            listener.close()
            if isinstance(error, PermissionError):
                raise OptionError(f"port {candidate} is for the administrator only: give one above 1023") from error
            if error.errno != errno.EADDRINUSE:
                raise OptionError(
                    f"{address} is not an address of this machine ({error.strerror}): the first machine's own is needed"
                ) from error
            if port is not None:
                raise OptionError(f"port {port} is taken by {holder(port)}: give another one, or none") from error
        else:
            return listener
    raise OptionError(f"{_TRIES} ports between {FREE_PORTS[0]} and {FREE_PORTS[-1]} are all taken: give one")


def _resolve(address: str, port: int) -> tuple[int, int, int, str, tuple[object, ...]]:
    try:
        return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OptionError(f"{address} is not a known address: {error.strerror}") from error


def holder(port: int) -> str:
    """Who listens on a port of this machine, in words: "process 4242 (python train.py)"."""
    links = {f"socket:[{inode}]" for inode in _listening_sockets(port)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(file.readlink()) in links for file in (process / "fd").iterdir()):
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                return f"process {process.name} ({' '.join(words).strip()[:80]})"
        except OSError:  # it has ended, or is not ours to look into
            continue
    return "a process that this user may not see"


def _listening_sockets(port: int) -> Iterator[str]:
    """Inode numbers of the sockets that listen on a port."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if not table.exists():
            continue
        for line in table.read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                yield rest[5]


def interfaces() -> dict[str, str | None]:
    """The network interfaces of this machine with their IPv4 addresses, None where one has none."""
    found: dict[str, str | None] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                found[name] = None
            else:
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_towards(address: str) -> str | None:
    """The interface whose own address is used to reach `address`; None where it cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing: it only chooses the way
            own = probe.getsockname()[0]
        except OSError:
            return None
    return next((name for name, of in interfaces().items() if of == own), None)
