"""The launchers of a job's machines: they meet, they hear of each other's failures, they leave together."""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from glm4.errors import EngineError, OptionError

_INTERVAL = 0.5
"""Seconds between two looks at the store."""
_SILENCE = 90.0
"""Seconds without a sign of life after which a machine counts as lost; ranks that wait for one find out earlier."""
_MEETING = 5.0
"""Seconds that the first machine waits for the others to see that the machines do not fit together."""
_LEAVING = 30.0
"""Seconds that the first machine, which holds the store, waits for the others to end after it."""


@dataclass(frozen=True, slots=True)
class Member:
    """What a launcher says of itself; all but `number` and `host` must be the same everywhere."""

    number: int
    machines: int
    local_size: int
    host: str = socket.gethostname()

    def __str__(self) -> str:
        return f"machine {self.number} ({self.host})"


class Machines:
    """All launchers of a job around one store, which the first one serves and the ranks use as well.

    A thread does all that could block once the job runs. With one machine there is nobody to hear from.
    """

    def __init__(self, me: Member, address: str, listener: socket.socket | None, port: int, timeout: float) -> None:
        """Serve the store on `listener`, or connect to `port` of `address` where it is None.

        Raises EngineError when the first machine does not answer within `timeout` seconds, or something else does.
        """
        self._me, self._address, self._timeout = me, address, timeout
        self._members = [me]
        self._failure: EngineError | None = None
        self._to_say: str | None = None
        self._answered = time.monotonic()
        self._leaving = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="glm4-machines", daemon=True)
        if listener is None:
            _wait_for(address, port, timeout)
        try:
            self.store = dist.TCPStore(  # type: ignore[attr-defined]
                address,
                port,
                is_master=listener is not None,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
                master_listen_fd=None if listener is None else listener.detach(),
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise EngineError(
                f"what answers at {address}:{port} is no launcher ({reason}): give another port"
            ) from error

    def meet(self) -> None:
        """Wait for all machines, and begin to watch them.

        Raises EngineError, naming those that do not come in time, and OptionError where two do not fit together.
        """
        me = self._me
        if me.machines == 1:
            return
        said = json.dumps([me.number, me.machines, me.local_size, me.host, secrets.token_hex(8)])
        if self.store.compare_set(f"machine/{me.number}", "", said).decode() != said:
            other = self._member(me.number)
            raise OptionError(f"node rank {me.number} is {other.host}'s already: give each machine its own")
        keys = [f"machine/{number}" for number in range(me.machines)]
        if not self._wait_for(keys, self._timeout):
            missing = [str(number) for number, key in enumerate(keys) if not self.store.check([key])]
            raise EngineError(
                f"machine {' and '.join(missing)} did not come within {self._timeout:g} s: start the same command "
                "there, with its own node rank"
            )
        self._members = [self._member(number) for number in range(me.machines)]
        self.store.set(f"met/{me.number}", "")
        self._check_sizes()
        self._answered = time.monotonic()
        self._watcher.start()

    def _check_sizes(self) -> None:
        """Raise OptionError where two machines were told different numbers of processes."""
        me = self._me
        for other in self._members:
            if (other.machines, other.local_size) != (me.machines, me.local_size):
                if me.number == 0:  # which holds the store: the others are to see it, too
                    self._wait_for([f"met/{number}" for number in range(len(self._members))], _MEETING)
                raise OptionError(
                    f"{other} starts {other.local_size} of {other.machines * other.local_size} processes, "
                    f"{me} {me.local_size} of {me.machines * me.local_size}: say the same on every machine"
                )

    def _wait_for(self, keys: list[str], seconds: float) -> bool:
        """Whether all keys are in the store within that time."""
        deadline = time.monotonic() + seconds
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _member(self, number: int) -> Member:
        *said, _ = json.loads(self.store.get(f"machine/{number}"))
        return Member(*said)

    def check(self) -> None:
        """Raise EngineError where another machine has failed or is lost; returns at once."""
        if self._failure is not None:
            raise self._failure
        if self._watcher.is_alive() and time.monotonic() - self._answered > _SILENCE:
            raise self._lost(self._members[0])

    def leave(self, failure: str | None = None, exit_code: int = 1) -> None:
        """Tell the others that this machine has ended, or how it failed; the first one waits for them.

        Raises what `check` raises.
        """
        if not self._watcher.is_alive():
            return
        if failure is not None:
            self._to_say = json.dumps([f"{self._me}: {failure}", exit_code])
        self._leaving.set()
        self._watcher.join(_LEAVING + 5 if self._me.number == 0 and failure is None else 2)
        if failure is None:
            self.check()

    def _watch(self) -> None:
        """All the traffic with the store while the job runs."""
        beats = dict.fromkeys(range(self._me.machines), ("", time.monotonic()))
        ended_at: float | None = None
        try:
            for beat in count():
                self.store.set(f"beat/{self._me.number}", str(beat))
                if self._to_say is not None:
                    self.store.compare_set("failure", "", self._to_say)
                    if self._me.number == 0:  # the store ends with this process: let the others read it
                        time.sleep(2 * _INTERVAL)
                    return
                if self.store.check(["failure"]):
                    text, code = json.loads(self.store.get("failure"))
                    self._failure = EngineError(text)
                    self._failure.exit_code = code
                    return
                if self._leaving.is_set() and self._to_say is None and ended_at is None:
                    ended_at = time.monotonic()
                    self.store.set(f"ended/{self._me.number}", "")
                if ended_at is not None and (self._me.number or self._all_ended(ended_at)):
                    return
                if self._me.number == 0:
                    self._check_beats(beats)
                self._answered = time.monotonic()
                if ended_at is None:
                    self._leaving.wait(_INTERVAL)
                else:
                    time.sleep(0.05)
        except RuntimeError:
            if not self._leaving.is_set():
                self._failure = self._lost(self._members[0])

    def _all_ended(self, since: float) -> bool:
        late = time.monotonic() - since > _LEAVING
        return late or self.store.check([f"ended/{other.number}" for other in self._members])

    def _check_beats(self, beats: dict[int, tuple[str, float]]) -> None:
        """Note, for the others too, a machine that has shown no sign of life for long."""
        now = time.monotonic()
        for other in self._members[1:]:
            key = f"beat/{other.number}"
            beat = self.store.get(key).decode() if self.store.check([key]) else ""
            last, since = beats[other.number]
            if beat != last:
                beats[other.number] = beat, now
            elif now - since > _SILENCE and not self.store.check([f"ended/{other.number}"]):
                self._to_say = json.dumps([str(self._lost(other)), 1])
                self._failure = self._lost(other)

    def _lost(self, member: Member) -> EngineError:
        where = f" at {self._address}" if member.number == 0 else ""
        return EngineError(
            f"{member}{where} is lost: its launcher has ended, or the network between is down; its own log says more"
        )


def _wait_for(address: str, port: int, timeout: float) -> None:
    """Until the first machine's launcher listens. Raises EngineError when it does not."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), left).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise EngineError(
        f"machine 0 does not answer at {address}:{port} within {timeout:g} s: start the same command with node rank 0 "
        "there, and let no firewall stand between"
    )
