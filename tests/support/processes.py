"""Several ranks on one machine: `run(work, *arguments)` calls a function on each, a process of its own (gloo, CPU)."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")


def run(
    work: Callable[..., Any],
    *arguments: Any,
    ranks: int = 2,
    seconds: float = 300,
    joined: bool = True,
    dying: Collection[int] = (),
) -> list[Any]:
    """Return what `work(*arguments)` returns on each rank. `work` and its arguments are pickled: it is in a module.

    Args:
        joined: the ranks are a process group. False: several ranks have torchrun's variables, and join by themselves.
        dying: ranks that die, of which None is returned.

    Raises:
        AssertionError: a rank failed, with what it raised; or they did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = partial(_begin, folder) if joined else partial(_as_under_torchrun, _free_port())
        pipes, processes = _started(_rank, ranks, start, work, arguments)
        found: dict[int, Any] = {}
        try:
            while len(found) < ranks:
                ready = wait([pipe for i, pipe in enumerate(pipes) if i not in found], timeout=seconds)
                assert ready, f"ranks {sorted({*range(ranks)} - found.keys())} have not ended after {seconds} s"
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        failed, value = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        failed, value = rank not in dying, None if rank in dying else "the process died"
                    assert not failed, f"rank {rank}:\n{value}"
                    found[rank] = value
        finally:
            for process in processes:
                if len(found) < ranks:
                    process.kill()
                process.join()
                process.close()
    return [found[rank] for rank in range(ranks)]


def run_script(path: str, *arguments: str) -> None:
    """Run a script in this process, in its directory, as `python path arguments` would."""
    sys.argv = [path, *arguments]
    warnings.simplefilter("ignore")
    runpy.run_path(path, run_name="__main__")


def kill_one(work: Callable[..., Any], *arguments: Any, after: float, ranks: int = 2) -> None:
    """SIGKILL rank 0 some seconds after every rank's `work(pipe, *arguments)`, which never ends, has sent a word."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = _started(_endless, ranks, partial(_begin, folder), work, arguments)
        for pipe in pipes:
            assert pipe.poll(60) and pipe.recv_bytes()
        time.sleep(after)
        for process in processes:
            process.kill()
            process.join()
            process.close()


def _started(
    target: Callable[..., None],
    ranks: int,
    start: Callable[[int, int], None],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> tuple[list[Connection], list[Any]]:
    pipes, processes = [], []
    start_server()
    for rank in range(ranks):
        here, there = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=target, args=(there, partial(start, rank, ranks), work, arguments))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    return pipes, processes


def start_server() -> None:
    """Start the server of `CONTEXT`, unless it runs. It imports `ranks.server` once; a rank is then a fork of it.

    A process has one server, and the last list of preloaded modules counts: other packages have theirs.
    """
    CONTEXT.set_forkserver_preload(["support.ranks.server"])
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
        forkserver.ensure_running()


def _begin(folder: str, rank: int, ranks: int) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    distributed.barrier()  # a rank that ends while another one connects makes that one fail


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _as_under_torchrun(port: int, rank: int, ranks: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if ranks == 1:
        return
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1")


def _endless(pipe: Connection, start: Callable[[], None], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with open(os.devnull, "w") as nothing:  # what a rank says when the other one dies
        os.dup2(nothing.fileno(), 2)
    start()
    work(pipe, *arguments)


def _rank(pipe: Connection, start: Callable[[], None], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from torch import distributed

    try:
        start()
        found = (False, work(*arguments))
    except BaseException:
        found = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(found))  # `send` would share a tensor's memory, which dies with this process
    if distributed.is_initialized():
        distributed.destroy_process_group()
