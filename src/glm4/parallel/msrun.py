"""Starting the processes of a MindSpore job with MindSpore's own launcher, msrun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from glm4.device_mindspore import INSTALL_HINT, require_mindspore
from glm4.errors import EngineError, OptionError
from glm4.parallel.launch import LaunchOptions
from glm4.parallel.network import listen


def launch_with_msrun(options: LaunchOptions) -> None:
    """Run the job, with the logs that `launch.launch` writes; the first rank's output goes to this process's streams.

    Returns when all ranks of this machine have ended well; with join=False, at once. Raises DeviceError where this
    environment has no MindSpore, OptionError where the port is taken, and EngineError when a rank fails.
    """
    require_mindspore()
    binaries = Path(sys.executable).parent
    msrun = shutil.which("msrun", path=f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}")
    if msrun is None:
        raise OptionError(f"backend mindspore: msrun is not here; {INSTALL_HINT}")
    port = options.port
    if options.node_rank == 0:  # taken, or chosen: msrun itself cannot tell
        with listen(options.master_address, port) as listener:
            port = listener.getsockname()[1]
    command = [
        msrun, f"--worker_num={options.processes}", f"--local_worker_num={options.local_processes}",
        f"--master_addr={options.master_address}", f"--master_port={port}", f"--node_rank={options.node_rank}",
        f"--log_dir={options.log_dir}", f"--join={options.join}", f"--cluster_time_out={options.timeout:.0f}",
        *(["--tail_worker_log=0"] if options.join and options.node_rank == 0 else []), *options.command,
    ]  # fmt: skip
    path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {"GLOG_v": "3"} | os.environ  # its own log: errors only, unless asked for more
    environment |= {"PATH": path, "LOCAL_WORLD_SIZE": str(options.local_processes)}
    try:
        code = subprocess.run(command, env=environment, check=False).returncode
    except OSError as error:
        raise EngineError(f"msrun cannot be started: {error.strerror}") from error
    if code:
        raise EngineError(f"a rank has failed (msrun left with exit code {code}): see {options.log_dir}/worker_*.log")
