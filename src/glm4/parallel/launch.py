"""Starting the processes of a job on this machine, as `glm4 launch` and scripts/msrun_launcher.sh do.

Ranks find RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment, as under
torchrun. The launchers of several machines meet at MASTER_ADDR:MASTER_PORT, where the first one serves the store that
torch.distributed uses, too: so that port is held from the first check to the end.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glm4.errors import INTERRUPTED, EngineError, Glm4Error, OptionError, OutputError
from glm4.parallel.network import interface_towards, listen

if TYPE_CHECKING:
    from glm4.parallel.elastic import Failure
    from glm4.parallel.machines import Machines

LOG_DIR = Path("output/msrun_log")
TIMEOUT = 600.0
_TAIL_LINES = 15
_TAIL_BYTES = 8192

log = logging.getLogger("glm4.launch")


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What is started, how often, and where. Raises OptionError when the numbers do not fit together."""

    command: tuple[str, ...]
    """A Python script or `glm4`, with its arguments."""
    processes: int
    """On all machines together."""
    local_processes: int
    """On each machine."""
    master_address: str = "127.0.0.1"
    """The first machine's."""
    port: int | None = None
    """On the first machine; None: a free one."""
    node_rank: int = 0
    """This machine's number."""
    log_dir: Path = LOG_DIR
    join: bool = True
    """Wait for the end of the job; otherwise it goes on in the background."""
    timeout: float = TIMEOUT
    """Seconds in which all machines have to come."""

    def __post_init__(self) -> None:
        if min(self.processes, self.local_processes) < 1:
            raise OptionError(f"{min(self.processes, self.local_processes)} processes: start at least one")
        if self.processes % self.local_processes:
            raise OptionError(
                f"{self.processes} processes cannot be {self.local_processes} on each machine: make it a multiple"
            )
        if not 0 <= self.node_rank < self.machines:
            raise OptionError(
                f"node rank {self.node_rank} is not there: {self.processes} processes, {self.local_processes} on each "
                f"machine, make {self.machines} machine{'s' if self.machines > 1 else ''}, counted from 0"
            )
        if self.port is not None and not 1 <= self.port <= 65535:
            raise OptionError(f"port {self.port} is out of range (1 to 65535)")
        if self.port is None and self.machines > 1:
            raise OptionError("several machines need one port that all of them know: give it, such as 8118")
        if not self.timeout > 0:
            raise OptionError(f"timeout {self.timeout:g} is out of range (above 0)")

    @property
    def machines(self) -> int:
        return self.processes // self.local_processes

    @property
    def ranks(self) -> range:
        """Those of this machine."""
        return range(self.node_rank * self.local_processes, (self.node_rank + 1) * self.local_processes)

    def log_of(self, rank: int) -> Path:
        """The file with all that a rank says."""
        return self.log_dir / f"worker_{rank}.log"


def launch(options: LaunchOptions) -> None:
    """Run the job, and return when all ranks of this machine have ended well; with join=False, return at once.

    The first rank's output goes to this process's streams as it comes. Raises OptionError for a command, an address or
    a port that cannot be used, OutputError for logs that cannot be written, and EngineError when a rank fails (with the
    rank's own exit code where it has one of glm4.errors'), when a machine does not come, and when the job is stopped.
    """
    command = program(options.command)
    listener = listen(options.master_address, options.port) if options.node_rank == 0 else None
    port = listener.getsockname()[1] if listener else options.port
    journal = _prepare_logs(options)
    if not options.join and _in_background(options, journal):
        return
    with_journal = logging.FileHandler(journal, encoding="utf-8")
    with_journal.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [log, logging.getLogger("torch.distributed.elastic")]
    for logger in loggers:
        logger.addHandler(with_journal)
        logger.propagate = False
    log.setLevel(logging.INFO)
    log.info("process %d starts rank %d to %d: %s", os.getpid(), options.ranks[0], options.ranks[-1], command)
    try:
        _run(options, command, listener, port)
        log.info("all ranks have ended")
    except (Glm4Error, KeyboardInterrupt) as error:
        log.error("%s", str(error) or "interrupted")
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(with_journal)
            logger.propagate = True
        with_journal.close()


def program(command: Sequence[str]) -> list[str]:
    """`command` as it is executed: a Python script or module, or `glm4`, by this interpreter.

    Raises OptionError for anything else.
    """
    words = list(command)
    if words and Path(words[0]).name in ("python", "python3"):
        words = words[1:]
    if words and words[0] == "glm4":
        words = ["-m", *words]
    if words and words[0] == "-m":
        return [sys.executable, *words]
    if not words or not words[0].endswith(".py"):
        raise OptionError(f"{' '.join(words)!r}: give a Python script or a glm4 command, with its arguments")
    if not Path(words[0]).is_file():
        raise OptionError(f"{words[0]}: no such script (looked in {Path.cwd()})")
    return [sys.executable, *words]


def _prepare_logs(options: LaunchOptions) -> Path:
    """A folder without the logs of a job before; the launcher's own log.

    They are removed and not overwritten: a job that still runs goes on writing to its own.
    """
    folder = options.log_dir
    journal = folder / ("scheduler.log" if options.node_rank == 0 else f"scheduler_{options.node_rank}.log")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = [options.log_of(rank) for rank in options.ranks]  # others' may lie here, too, on a shared disk
        for path in (journal, *(folder.glob("worker_*.log") if options.machines == 1 else own)):
            path.unlink(missing_ok=True)
        journal.touch()
    except OSError as error:
        raise OutputError(f"{folder} cannot hold the logs: {error.strerror}; give another folder") from error
    return journal


def _in_background(options: LaunchOptions, journal: Path) -> bool:
    """Whether this process is the one that may leave; the other one, its child, runs the job."""
    sys.stdout.flush()
    if pid := os.fork():
        print(f"started in the background as process {pid} (kill {pid} stops it); logs: {options.log_dir}", flush=True)
        return True
    os.setsid()
    with Path(os.devnull).open("rb") as nothing, journal.open("ab") as file:
        for source, stream in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source.fileno(), stream)
    return False


def _run(options: LaunchOptions, command: list[str], listener: socket.socket | None, port: int | None) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or names that no resolver knows fill the terminal
    from glm4.parallel.elastic import RankLogs, Stopped, run_ranks
    from glm4.parallel.machines import Machines, Member

    assert port is not None
    me = Member(options.node_rank, options.machines, options.local_processes)
    machines = Machines(me, options.master_address, listener, port, options.timeout)
    machines.meet()
    environments = {rank - options.ranks[0]: _environment(options, rank, port) for rank in options.ranks}
    paths = {local_rank: options.log_of(int(env["RANK"])) for local_rank, env in environments.items()}
    logs = RankLogs(paths, shown=options.join and options.node_rank == 0)
    try:
        failure = run_ranks(command, environments, logs, machines.check)
        if failure is None:
            logs.check()
    except Stopped as stopped:
        machines.leave(f"stopped by {stopped}", 128 + stopped.number)
        if stopped.number == signal.SIGINT:
            raise KeyboardInterrupt from stopped
        raise _failed(f"stopped by {stopped}", 128 + stopped.number) from stopped
    except Glm4Error as error:
        machines.leave(str(error), error.exit_code)
        raise
    if failure is not None:
        raise _report(options, machines, failure)
    machines.leave()


def _environment(options: LaunchOptions, rank: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank, and what makes sense on this machine where nothing else is said."""
    towards = interface_towards(options.master_address)
    threads = max(1, len(os.sched_getaffinity(0)) // options.local_processes)
    defaults = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if towards is not None:
        defaults |= {"GLOO_SOCKET_IFNAME": towards, "NCCL_SOCKET_IFNAME": towards, "HCCL_SOCKET_IFNAME": towards}
    return {
        **{name: value for name, value in defaults.items() if name not in os.environ},
        "RANK": str(rank),
        "WORLD_SIZE": str(options.processes),
        "LOCAL_RANK": str(rank - options.ranks[0]),
        "LOCAL_WORLD_SIZE": str(options.local_processes),
        "GROUP_RANK": str(options.node_rank),
        "GROUP_WORLD_SIZE": str(options.machines),
        "MASTER_ADDR": options.master_address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _report(options: LaunchOptions, machines: Machines, failure: Failure) -> EngineError:
    """Show the end of the failed rank's log and tell the other machines; the error to raise."""
    path = options.log_of(failure.rank)
    lines = _tail(path)
    who = f"rank {failure.rank} (process {failure.pid})"
    if failure.code < 0:
        name = signal.Signals(-failure.code).name
        what = f"{who} was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    else:
        what = f"{who} ended with exit code {failure.code}"
    own = next((said for line in reversed(lines) if (said := line.partition("error: ")[2])), "")
    message = f"{what}{own and ': '}{own}; its log: {path}"
    machines.leave(message, exit_code := _exit_code(failure.code))
    if failure.rank != 0 or not options.join:  # the first rank's is on the terminal already
        print(f"the end of {path}:", *lines, sep="\n  ", file=sys.stderr, flush=True)
    return _failed(message, exit_code)


def _failed(message: str, exit_code: int) -> EngineError:
    error = EngineError(message)
    error.exit_code = exit_code
    return error


def _exit_code(code: int) -> int:
    """The rank's own where it means what glm4.errors says, else 1."""
    ours = {kind.exit_code for kind in Glm4Error.__subclasses__()}
    return code if code in ours or code == INTERRUPTED else 1


def _tail(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace").rstrip().splitlines()[-_TAIL_LINES:]
