"""Start and clean end of a distributed run.

`destroy_process_group` drops the groups, but objects that still refer to one keep its threads alive: meshes, which
PyTorch caches with the placements of sharded tensors, and functions imported after `init_process_group`, with a group
as default argument. Such threads are running when the interpreter ends, and sometimes abort a run that has written
everything: `terminate called without an active exception`.
"""

from __future__ import annotations

import gc
import os
import sys
from types import FunctionType
from typing import Any

from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from peftcore.errors import PeftcoreError


def check_running() -> None:
    """Raise a PeftcoreError unless a distributed run has begun."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise PeftcoreError(
            "no distributed run has begun. Start the script with `torchrun --nproc-per-node N script.py`, and call "
            "torch.distributed.init_process_group() first"
        )


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


def finish() -> None:
    """End this process's part in a distributed run; the last call of a script. Collective.

    Wait for the other ranks, destroy all process groups, and clear all attributes and defaults that refer to one, so
    that nothing is left when Python ends. While an exception propagates, do not wait. Without a run, or after
    `destroy_process_group`, only clear references.
    """
    if not distributed.is_available():
        return
    if distributed.is_initialized():
        if sys.exc_info()[0] is None:
            distributed.barrier()
        distributed.destroy_process_group()
    for holder in gc.get_objects():
        _let_go(holder)
    gc.collect()


def _let_go(holder: Any) -> None:
    kind = type(holder)  # any object may be here, so its own attribute lookup is not used
    if kind is FunctionType:
        if any(map(_is_group, holder.__defaults__ or ())):
            holder.__defaults__ = tuple(None if _is_group(value) else value for value in holder.__defaults__)
    elif kind.__dictoffset__ and not issubclass(kind, type):
        try:
            attributes = object.__getattribute__(holder, "__dict__")
        except AttributeError:  # objects of C, such as cffi's, may hide theirs
            return
        for name, value in list(attributes.items()):
            if _is_group(value):
                attributes[name] = None
            elif type(value) in (dict, list, tuple) and any(map(_is_group, _elements(value))):
                attributes[name] = type(value)()


def _elements(values: Any) -> Any:
    return list(values.values()) if type(values) is dict else values


def _is_group(value: object) -> bool:
    """Return whether it is a process group, or contains one invisibly, like DDP."""
    holders = (distributed.Reducer, distributed.Logger)  # type: ignore[attr-defined]  # there, and not in its stubs
    return issubclass(type(value), (distributed.ProcessGroup, *holders))
