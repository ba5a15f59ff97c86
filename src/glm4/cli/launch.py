"""`glm4 launch`: several processes of one program, which share a model."""

from __future__ import annotations

from pathlib import Path

import click

from glm4.parallel.launch import LOG_DIR, TIMEOUT, LaunchOptions, launch
from glm4.parallel.msrun import launch_with_msrun


@click.command(
    "launch",
    short_help="start a program in several processes, on one machine or more",
    context_settings={"allow_interspersed_args": False},
)
@click.option("--nproc", type=int, required=True, metavar="N", help="processes on this machine: one for each card")
@click.option("--nnodes", type=int, default=1, metavar="N", help="machines, each with --nproc processes [default: 1]")
@click.option("--node-rank", type=int, default=0, metavar="N", help="this machine's number, from 0 [default: 0]")
@click.option("--master-addr", default="127.0.0.1", metavar="TEXT", help="address of machine 0 [default: 127.0.0.1]")
@click.option("--port", type=int, metavar="N", help="a port of machine 0 [default: a free one; needed with --nnodes]")
@click.option(
    "--log-dir", type=click.Path(path_type=Path), default=LOG_DIR, help=f"folder of the logs [default: {LOG_DIR}]"
)
@click.option("--no-join", is_flag=True, help="return at once; the job goes on in the background")
@click.option(
    "--timeout",
    type=float,
    default=TIMEOUT,
    metavar="X",
    help=f"seconds in which all machines have to come [default: {TIMEOUT:g}]",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def command(
    nproc: int,
    nnodes: int,
    node_rank: int,
    master_addr: str,
    port: int | None,
    log_dir: Path,
    no_join: bool,
    timeout: float,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND, a Python script or `glm4 …`, in several processes; see docs/parallel.md.

    Each process finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment,
    as under torchrun. What rank 0 says is shown; what each says is in worker_<rank>.log. When one fails, all are
    stopped.

    \b
    Examples:
      glm4 launch --nproc 2 -- glm4 generate '请介绍一下北京' -m /path/hf_dir --tensor-parallel 2
      glm4 launch --nproc 8 --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --port 8118 -- my_script.py
    """
    options = LaunchOptions(
        command=command,
        processes=nproc * nnodes,
        local_processes=nproc,
        master_address=master_addr,
        port=port,
        node_rank=node_rank,
        log_dir=log_dir,
        join=not no_join,
        timeout=timeout,
    )
    if _backend(options) == "mindspore":
        launch_with_msrun(options)
    else:
        launch(options)


def _backend(options: LaunchOptions) -> str:
    """The library that computes. Raises what every rank of run_mindformer.py would raise about its flags, its YAML and
    its prompts: once, now."""
    script, *flags = options.command
    if Path(script).name != "run_mindformer.py":
        said = " ".join(flags).replace("=", " ")
        return "mindspore" if "--backend mindspore" in said else "torch"
    if {"--help", "-h"} & set(flags):
        return "torch"
    from glm4.mindformers.config import read_job

    sizes = {"WORLD_SIZE": options.processes, "LOCAL_WORLD_SIZE": options.local_processes}
    places = {"RANK": options.ranks[0], "LOCAL_RANK": 0}
    environment = {name: str(value) for name, value in (sizes | places).items()}
    return read_job(flags, Path(script).resolve().parent, environment).engine.backend
