"""Commands on several processes that torchrun starts: rank 0 prints, and a failure of any rank ends all ranks."""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed

from peftcore.errors import PeftcoreError
from peftcore_cli import console
from peftcore_cli.bases.device_choice import torch_device

WAYS = ("ddp", "fsdp2")


def join(parallel: str | None, device: str) -> None:
    """Join the process group of torchrun, if torchrun started this process.

    Raises:
        PeftcoreError: `parallel` is unknown, or does not fit the number of processes.
    """
    process_count = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel is None:
        if process_count > 1:
            raise PeftcoreError(
                f"torchrun has started {process_count} processes, which need --parallel. Pass --parallel ddp"
            )
        return
    if parallel not in WAYS:
        raise PeftcoreError(f"--parallel must be one of {', '.join(WAYS)}, found '{parallel}'")
    if "RANK" not in os.environ:
        raise PeftcoreError(
            "--parallel needs several processes. Start them with torchrun --nproc-per-node 2 -m peftcore_cli "
            f"{' '.join(sys.argv[1:2])} ..."
        )
    own_device = torch_device(device)
    on_cuda = own_device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(_local_gpu(own_device))
    from peftcore.distributed import start

    start("nccl" if on_cuda else "gloo")
    if distributed.get_rank() > 0:
        console.silence(f"rank {distributed.get_rank()}")


def _local_gpu(device: torch.device) -> int:
    """Return the index of this process's GPU."""
    if device.index is not None:
        raise PeftcoreError(
            f"--parallel uses one GPU per process, so --device {device} cannot select a single GPU. Pass --device "
            "cuda, and select GPUs with CUDA_VISIBLE_DEVICES"
        )
    card, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if card >= cards:
        raise PeftcoreError(
            f"--parallel uses one GPU per process, but this is process {card + 1} on a machine with {cards} GPUs. "
            f"Start fewer processes: torchrun --nproc-per-node {cards}"
        )
    return card


def leave() -> None:
    """Leave the process group, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        from peftcore.distributed import finish

        finish()
