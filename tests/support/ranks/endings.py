"""How ranks begin and end, for tests/distributed: `finish`, restarts, and ranks that die in `save`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.plugin import ranks
from support.ranks import work
from support.ranks.work import mine, model, optimizer_of, step


def saving(pipe: Any, folder: str) -> None:
    """Save two adapters in turn, until killed."""
    pair = []
    for value in (1.0, 2.0):
        found = peftcore.apply(model(), "lora", r=2)
        with torch.no_grad():
            for _, parameter in adapter_parameters(found, "default"):
                parameter.fill_(value)
        pair.append(peftcore.shard(found, adapter_placement="shard"))
    peftcore.save(pair[0], folder)
    pipe.send_bytes(b"ready")
    while True:
        for found in pair:
            peftcore.save(found, folder)


def saving_with_a_dying_rank(folder: str, base_folder: str | None) -> str:
    """Save twice; rank 1 dies in the second call, when it waits for rank 0 to write. On what tells it."""
    from support.ranks import bases

    found = model() if base_folder is None else bases.base(base_folder, "llama", tp_size=2)
    peftcore.apply(found, "lora", r=2)
    if base_folder is None:
        peftcore.shard(found)
    peftcore.save(found, folder)
    if ranks.rank() == 1:
        ranks.once = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    try:
        peftcore.save(found, folder)
    except peftcore.PeftcoreError as error:
        return str(error)
    return "nothing was raised"


def ended(how: str) -> dict[str, dict[str, int]]:
    """Native threads of this process by name: before the run ends, and after it was ended by `how`."""
    import importlib

    import torch.distributed.nn.functional

    def threads() -> dict[str, int]:
        names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
        return {name: names.count(name) for name in names if "gloo" in name}

    importlib.reload(torch.distributed.nn.functional)  # as if it were imported now: defaults are the group
    found = work.adapted("lora")
    if how.startswith("ddp"):
        found = nn.parallel.DistributedDataParallel(found)
    else:
        peftcore.shard(found)
    step(found, mine(), optimizer_of(found))
    before = threads()
    if how.endswith(", finish"):
        peftcore.distributed.finish()
        peftcore.distributed.finish()  # there is nothing left to do
    elif how.endswith(", destroy, then finish"):
        distributed.destroy_process_group()
        peftcore.distributed.finish()
    else:
        distributed.destroy_process_group()
    return {"before": before, "after": threads()}


def failing_alone() -> str:
    """Rank 0 fails, and its `finish` waits for nobody."""
    if ranks.rank() == 0:
        try:
            raise ValueError("of rank 0")
        except ValueError as error:
            peftcore.distributed.finish()
            return str(error)
    return "waits"


def started_twice() -> list[tuple[bool, float]]:
    """(whether the store has the keys of the attempt before, sum of ones over the ranks) of two attempts."""
    found = []
    for attempt in range(2):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        peftcore.distributed.start("gloo")
        store = distributed.distributed_c10d._get_default_store()
        stale = store.check(["address"])
        total = torch.ones(())
        distributed.all_reduce(total)
        store.set("address", "of this attempt")
        found.append((stale, total.item()))
        distributed.destroy_process_group()
    return found
