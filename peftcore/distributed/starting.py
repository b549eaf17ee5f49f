"""Start of a distributed run, also after torchrun has restarted it."""

from __future__ import annotations

import os

from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous


def start(backend: str | None = None) -> None:
    """Join the run that torchrun started, also after `--max-restarts` has replaced lost ranks. Collective.

    `torch.distributed.init_process_group()` then waits forever: torchrun's store still has the addresses of the ranks
    before. Here every attempt has keys of its own in the store. On several machines use `--max-restarts 0` and start
    the whole job again: a machine that replaces another one does not know how many attempts there were.

    Args:
        backend: such as `gloo` or `nccl`; None: PyTorch's choice for the devices of this machine.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None:  # joined without torchrun, or by mpirun
        distributed.init_process_group(backend)
        return
    store, rank, world_size = next(rendezvous("env://"))
    store = PrefixStore(f"attempt {attempt} of {world_size}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
