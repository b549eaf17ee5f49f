"""Start a distributed run, and end it cleanly.

`destroy_process_group` drops the groups, but objects that still refer to one keep its threads alive: meshes, which
PyTorch caches with the placements of sharded tensors, and functions imported after `init_process_group`, with a group
as default argument. Such threads still run when the interpreter exits, and sometimes abort a run that has already
written its results: `terminate called without an active exception`.
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
    """Join the run that torchrun started; this also works after `--max-restarts` has replaced lost ranks. Collective.

    After a restart `torch.distributed.init_process_group()` waits forever, because torchrun's store still has the
    addresses of the previous ranks. This function uses separate keys in the store for each attempt. On several
    machines, use `--max-restarts 0` and restart the whole job: a replacement machine does not know the number of
    previous attempts.

    Args:
        backend: a backend such as `gloo` or `nccl`; None lets PyTorch choose by the devices of this machine.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None:  # started without torchrun, or by mpirun
        distributed.init_process_group(backend)
        return
    store, rank, world_size = next(rendezvous("env://"))
    store = PrefixStore(f"attempt {attempt} of {world_size}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def finish() -> None:
    """Leave the distributed run; make this the last call of a script. Collective.

    Wait for the other ranks, destroy all process groups, and clear all attributes and default arguments that refer to a
    process group, so that no thread of a group is left when Python exits. If an exception is propagating, do not wait.
    Without a run, or after `destroy_process_group`, only clear the references.
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
    kind = type(holder)  # the object may have any class, so avoid its own attribute lookup
    if kind is FunctionType:
        if any(map(_is_group, holder.__defaults__ or ())):
            holder.__defaults__ = tuple(None if _is_group(value) else value for value in holder.__defaults__)
    elif kind.__dictoffset__ and not issubclass(kind, type):
        try:
            attributes = object.__getattribute__(holder, "__dict__")
        except AttributeError:  # C objects, such as cffi's, may not support it
            return
        for name, value in list(attributes.items()):
            if _is_group(value):
                attributes[name] = None
            elif type(value) in (dict, list, tuple) and any(map(_is_group, _elements(value))):
                attributes[name] = type(value)()


def _elements(values: Any) -> Any:
    return list(values.values()) if type(values) is dict else values


def _is_group(value: object) -> bool:
    """Return whether `value` is a process group, or holds one where Python cannot see it, as DDP does."""
    holders = (distributed.Reducer, distributed.Logger)  # type: ignore[attr-defined]  # exists, but is missing in the type stubs
    return issubclass(type(value), (distributed.ProcessGroup, *holders))
