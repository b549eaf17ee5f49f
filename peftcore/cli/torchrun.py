"""A command on several processes, which torchrun has started: rank 0 speaks, and every rank can end them all."""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed

from peftcore.cli import console
from peftcore.cli.models import torch_device
from peftcore.errors import PeftcoreError

WAYS = ("ddp", "fsdp2")


def join(parallel: str | None, device: str) -> None:
    """Join the run that torchrun has started, if it has.

    Raises:
        PeftcoreError: `parallel` is no way to share the work, or it and torchrun do not go together.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel is None:
        if started > 1:
            raise PeftcoreError(
                f"torchrun has started {started} processes. Say how they share the work: --parallel ddp"
            )
        return
    if parallel not in WAYS:
        raise PeftcoreError(f"--parallel is one of {', '.join(WAYS)}, found '{parallel}'")
    if "RANK" not in os.environ:
        raise PeftcoreError(
            f"--parallel needs several processes: torchrun --nproc-per-node 2 -m peftcore {' '.join(sys.argv[1:2])} ..."
        )
    on_cuda = torch_device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_cuda else "gloo")
    if distributed.get_rank() > 0:
        console.silence(f"rank {distributed.get_rank()}")


def leave() -> None:
    """End this process's part in the run, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        from peftcore.parallel import finish

        finish()
