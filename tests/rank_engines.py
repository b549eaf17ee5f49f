"""What ranks do for tests/parallel/test_engines.py: each engine trains, saves and resumes eight kinds of methods."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import rank_work
import rank_zero
import torch
import torch.distributed.checkpoint as dcp
import trainers
from rank_cases import CASES
from torch import Tensor, distributed, nn

import peftcore
from peftcore import ranks

METHODS = {
    "LoRA": "lora", "QLoRA": "qlora", "DoRA": "dora", "IA3": "ia3", "adapters": "adapter", "prefixes": "prefix-tuning",
    "BitFit": "bitfit", "LoRA on experts": "lora, experts in 4 bits",
}  # fmt: skip
STEPS = 3  # of which the last one follows a checkpoint


def optimizer_of(found: nn.Module) -> torch.optim.Optimizer:
    """AdamW that does not enlarge the rounding of tiny gradients."""
    return torch.optim.AdamW([p for p in found.parameters() if p.requires_grad], lr=0.01, eps=1e-3, foreach=False)


def step_alone(found: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    rank_work.backward_alone(found)
    optimizer.step()
    optimizer.zero_grad()
    return rank_work.values(found)


def loaded(case: str, folder: str) -> dict[str, Tensor]:
    kind, _, quantized = CASES[case]
    base = rank_work.model(kind)
    if quantized:
        peftcore.quantize(base)
    return rank_work.values(peftcore.load(base, folder))


def own_loop(engine: str, case: str, folder: str) -> dict[str, float]:
    """DDP, FSDP2 and accelerate: differences from one process after two steps, in the file, and after resuming."""
    alone, found = rank_work.adapted(case), rank_work.adapted(case)
    spread: nn.Module = found
    if engine == "FSDP2":
        peftcore.shard(found)
    optimizer: Any = optimizer_of(found)
    if engine == "DDP":
        spread = nn.parallel.DistributedDataParallel(found)
    elif engine == "accelerate":
        from accelerate import Accelerator

        spread, optimizer = Accelerator(cpu=True).prepare(found, optimizer)
        assert isinstance(spread, nn.parallel.DistributedDataParallel)
        optimizer = optimizer.optimizer
    of_alone = optimizer_of(alone)
    for _ in range(STEPS - 1):
        wanted = step_alone(alone, of_alone)
        rank_work.backward_here(spread, found)
        optimizer.step()
        optimizer.zero_grad()
    here = rank_work.values(found)
    peftcore.save(found, f"{folder}/adapter")
    dcp.save({"training": peftcore.TrainingState(spread, optimizer)}, checkpoint_id=f"{folder}/state")
    distributed.barrier()
    other = rank_work.adapted(case)
    of_other = optimizer_of(other)
    dcp.load({"training": peftcore.TrainingState(other, of_other)}, checkpoint_id=f"{folder}/state")
    resumed, last = step_alone(other, of_other), step_alone(alone, of_alone)
    assert rank_work.farthest(last, wanted) > 0.001
    return {
        "equal": rank_work.farthest(here, wanted),
        "save": rank_work.farthest(loaded(case, f"{folder}/adapter"), here),
        "resume": rank_work.farthest(resumed, last),
    }


def zero(stage: int, case: str, folder: str) -> dict[str, float]:
    """DeepSpeed's ZeRO: the same, resumed from DeepSpeed's checkpoint on as many ranks."""
    deepspeed = rank_zero.begin()
    alone = rank_work.adapted(case)
    of_alone = optimizer_of(alone)

    def begun() -> tuple[nn.Module, Any]:
        found = rank_work.adapted(case)
        config = rank_zero.CONFIG | {"zero_optimization": {"stage": stage}}
        return found, deepspeed.initialize(model=found, optimizer=optimizer_of(found), config=config)[0]

    def step(found: nn.Module, engine: Any) -> dict[str, Tensor]:
        torch.manual_seed(ranks.rank())
        engine.backward(rank_work.loss(engine, rank_work.mine()) + peftcore.extra_loss(found))
        engine.step()
        return rank_zero.values(found)

    found, engine = begun()
    for _ in range(STEPS - 1):
        wanted, here = step_alone(alone, of_alone), step(found, engine)
    peftcore.save(found, f"{folder}/adapter")
    engine.save_checkpoint(f"{folder}/state", exclude_frozen_parameters=True)
    distributed.barrier()
    other, again = begun()
    again.load_checkpoint(f"{folder}/state", load_module_strict=False)
    resumed, last = step(other, again), step_alone(alone, of_alone)
    return {
        "equal": rank_work.farthest(here, wanted),
        "save": rank_work.farthest(loaded(case, f"{folder}/adapter"), here),
        "resume": rank_work.farthest(resumed, last),
    }


def by_trainer(case: str, folder: str, alone: bool) -> dict[str, Tensor]:
    """Adapter after Trainer's steps; `alone`: in one process, from the second checkpoint of two ranks if it exists."""
    there = Path(folder) / f"checkpoint-{STEPS - 1}"
    settings = {"save_strategy": "steps", "save_steps": 1, "adam_epsilon": 1e-3, "max_grad_norm": 0.0}
    count = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 if alone else 1}
    found = rank_work.adapted(case)
    trainer = trainers.trainer(Path(folder), found, **settings, **count)
    trainer.train(resume_from_checkpoint=str(there) if alone and there.exists() else None)
    return rank_work.values(found)


def measured(engine: str, case: str, folder: str) -> dict[str, float] | str:
    try:
        if engine.startswith("ZeRO"):
            return zero(int(engine[-1]), case, folder)
        return own_loop(engine, case, folder)
    except peftcore.PeftcoreError as error:
        return str(error)


def table(engines: list[str], folder: str) -> dict[str, dict[str, dict[str, float] | str]]:
    warnings.simplefilter("ignore")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    number, count = str(ranks.rank()), str(ranks.count())
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29534"}
    return {
        engine: {name: measured(engine, case, f"{folder}/{engine}/{name}") for name, case in METHODS.items()}
        for engine in engines
    }


def trained_by_trainer(folder: str, alone: bool) -> dict[str, dict[str, Tensor]]:
    warnings.simplefilter("ignore")
    return {name: by_trainer(case, f"{folder}/{name}", alone) for name, case in METHODS.items()}


def zero_on_one_rank(stage: int, folder: str) -> str:
    """What DeepSpeed says where a checkpoint of two ranks is resumed on one."""
    deepspeed = rank_zero.begin()
    found = rank_work.adapted("lora")
    config = rank_zero.CONFIG | {"zero_optimization": {"stage": stage}}
    engine = deepspeed.initialize(model=found, optimizer=optimizer_of(found), config=config)[0]
    try:
        engine.load_checkpoint(f"{folder}/state", load_module_strict=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
