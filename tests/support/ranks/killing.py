"""What two ranks of tests/distributed/test_killed.py do: one of them is killed in a training step, or in `save`.

Each method has a pair of processes of its own, forked from the two ranks, which have no process group themselves.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import peftcore
from peftcore.plugin import ranks
from support.ranks.bases import base
from support.ranks.meshes import METHODS, SKIP, Run, kind_of
from support.ranks.work import farthest, values

MOMENTS = ("in a step", "in save")


def way_of(name: str) -> str:
    return "expert parallel" if name == "LoRA on experts" else "tp_plan"


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pair(folder: str, name: str, moment: str, rank: int) -> None:
    """Train and save, go on, and write down what is raised when rank 1 is killed."""
    here = f"{folder}/{name}, {moment}"
    distributed.init_process_group("gloo", init_method=f"file://{here}.store", rank=rank, world_size=2)
    spread = Run(way_of(name), folder, name)
    saved = []
    for number in range(2):
        if number and moment == "in a step":
            break
        spread.step()
        saved.append({key: value.clone() for key, value in values(spread.whole).items()})
        if number and rank == 1:
            ranks.once = die  # when it waits for rank 0 to write
        if not number:
            peftcore.save(spread.whole, here)
    torch.save(saved, f"{here}.values")
    try:
        if moment == "in save":
            peftcore.save(spread.whole, here)
        else:
            if rank == 1:  # in the backward pass
                next(p for p in spread.whole.parameters() if p.requires_grad).register_hook(die)
            spread.step()
            spread.step()
        said = ["nothing was raised", ""]
    except Exception as error:
        said = [type(error).__name__, str(error)]
    Path(f"{here}.json").write_text(json.dumps(said))


def killed(folder: str) -> dict[str, dict[str, str]]:
    """By moment and method: the error of rank 0, after which what it had saved was loaded in one process."""
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    for name in METHODS:
        for moment in MOMENTS:
            child = os.fork()
            if child == 0:
                try:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a rank says when the other one dies
                    pair(folder, name, moment, rank)
                finally:
                    os._exit(0)
            status = os.waitpid(child, 0)[1]
            assert rank == 0 or os.WTERMSIG(status) == signal.SIGKILL, (name, moment, status)
    if rank:
        return {}
    return {moment: {name: loaded(folder, name, moment) for name in METHODS} for moment in MOMENTS}


def loaded(folder: str, name: str, moment: str) -> str:
    here, kind = f"{folder}/{name}, {moment}", kind_of(way_of(name), name)
    found: Any = base(folder, kind)
    if name == "QLoRA":
        peftcore.quantize(found, blocksize=32, skip=SKIP if kind == "qwen3_moe" else None)
    there = values(peftcore.load(found, here))
    assert min(farthest(there, each) for each in torch.load(f"{here}.values")) == 0.0
    kind_of_error, text = json.loads(Path(f"{here}.json").read_text())
    return f"{kind_of_error}: {text}"
