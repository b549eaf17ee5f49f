"""What ranks do under DeepSpeed's ZeRO-3, on CPUs. In a module of its own, since their processes import it."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.files.loading import restore
from peftcore.plugin import ranks, sharded
from support.ranks import bases, work
from support.ranks.cases import CASES

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported
CONFIG = {
    "train_micro_batch_size_per_gpu": 3,
    "gradient_clipping": 0.0,  # the default is 1
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
# Adam's first steps divide by the size of a gradient, so that rounding would count as much as a gradient that is tiny.
SMOOTH: dict[str, Any] = {"adam_epsilon": 1e-3, "max_grad_norm": 0.0}


def begin() -> Any:
    """DeepSpeed, which takes the process group that there is."""
    import deepspeed

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    number, count = str(ranks.rank()), str(ranks.count())
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return deepspeed


def engine_of(found: nn.Module, optimizer: type[torch.optim.Optimizer], lr: float, **zero: Any) -> Any:
    """DeepSpeed's engine around `found`, whose parameters it partitions."""
    trained = [p for p in found.parameters() if p.requires_grad]
    config = CONFIG | {"zero_optimization": CONFIG["zero_optimization"] | zero}
    return begin().initialize(model=found, optimizer=optimizer(trained, lr=lr), config=config)[0]


def values(found: nn.Module) -> dict[str, Tensor]:
    return {name: sharded.whole(p).clone() for name, p in adapter_parameters(found, "default")}


def one_step(case: str) -> float | str:
    """How far the adapter is, after one step, from one process on the rows of all ranks; or the error."""
    alone, spread = work.adapted(case), work.adapted(case)
    engine = engine_of(spread, torch.optim.SGD, 0.1)
    assert all(p.numel() == 0 for p in spread.parameters())
    torch.manual_seed(ranks.rank())
    try:
        engine.backward(work.loss(engine, work.mine()) + peftcore.extra_loss(spread))
    except peftcore.PeftcoreError as error:
        return str(error)
    engine.step()
    work.backward_alone(alone)
    torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1, foreach=False).step()
    return work.farthest(values(spread), work.values(alone))


def one_step_of_each() -> dict[str, float | str]:
    begin()
    return {case: one_step(case) for case in CASES}


def on_partitioned(case: str, folder: str) -> float:
    """The same where DeepSpeed has partitioned the base as it was read, before the adapter is applied."""
    from transformers.integrations import HfDeepSpeedConfig

    begin()
    kind = CASES[case][0]
    reading = HfDeepSpeedConfig(CONFIG)  # transformers looks for it while it lives
    spread = bases.base(folder, kind)
    del reading
    assert all(p.numel() == 0 for p in spread.parameters())
    bases.adapted(spread, case)
    engine = engine_of(spread, torch.optim.SGD, 0.1)
    torch.manual_seed(ranks.rank())
    engine.backward(work.loss(engine, work.mine()) + peftcore.extra_loss(spread))
    engine.step()
    alone = bases.adapted(bases.base(folder, kind), case)
    work.backward_alone(alone)
    torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1, foreach=False).step()
    return work.farthest(values(spread), work.values(alone))


def table_on_partitioned(folder: str) -> dict[str, float | str]:
    return bases.table(on_partitioned, bases.DENSE, folder)


def loaded_on_partitioned(folder: str, adapter: str) -> dict[str, Tensor]:
    """An adapter from a folder, on such a base."""
    from transformers.integrations import HfDeepSpeedConfig

    begin()
    reading = HfDeepSpeedConfig(CONFIG)
    found = peftcore.load(bases.base(folder, "llama"), adapter)
    del reading
    return values(found)


def projected() -> dict[str, float]:
    """Largest norm of a trained block of COFT after a step, of which `after_step` keeps it small; AdaLoRA's error."""
    begin()
    found = work.model()
    peftcore.apply(found, "oft", oft_block_size=9, coft=True, eps=1e-4)
    engine = engine_of(found.train(), torch.optim.SGD, 10.0)
    engine.backward(work.loss(engine, work.mine()))
    engine.step()
    before = max(value.norm().item() for value in values(found).values())
    peftcore.after_step(found, 1, 2)
    return {"before": before, "after": max(value.norm().item() for value in values(found).values())}


def refused_and_counted() -> tuple[dict[str, str], tuple[int, ...], tuple[int, ...]]:
    """What raises on a partitioned model; its counts of parameters and those of a plain one; nothing is changed."""
    begin()
    found, plain = work.adapted("lora"), work.adapted("lora")
    engine_of(found, torch.optim.SGD, 0.1)
    optimizer = torch.optim.SGD([p for p in found.parameters() if p.requires_grad])
    calls = {
        "merge": lambda: peftcore.merge(found, undo=True),
        "state": lambda: peftcore.TrainingState(found, optimizer),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except peftcore.PeftcoreError as error:
            told[name] = str(error)
    counts = []
    for each in (found, plain):
        summary = peftcore.summary(each)
        counts.append((summary.trainable_parameters, summary.base_parameters, summary.base_bytes))
    return told, counts[0], counts[1]


def modules_without_gradients() -> str:
    begin()
    found = work.adapted("adalora")
    engine = engine_of(found, torch.optim.SGD, 0.1)
    engine.backward(work.loss(engine, work.mine()))
    engine.step()
    try:
        peftcore.after_step(found, 1, 1000)
    except peftcore.PeftcoreError as error:
        return str(error)
    return "nothing was raised"


def saved_and_restored(folder: str, **zero: Any) -> dict[str, dict[str, Tensor]]:
    """What an adapter was when it was saved, after more steps, after `restore`, and a step later."""
    begin()
    found = work.adapted("lora")
    engine = engine_of(found, torch.optim.AdamW, 0.01, **zero)

    def step() -> dict[str, Tensor]:
        engine.backward(work.loss(engine, work.mine()))
        engine.step()
        return values(found)

    stages = {"saved": step()}
    peftcore.save(found, folder)
    step()
    stages["moved"] = step()
    restore(found, folder)
    stages["restored"] = values(found)
    stages["a step later"] = step()
    return stages


def trained_by_trainer(folder: str, stage: int, gather: bool, resume: bool) -> list[float]:
    """Losses of a run of Trainer, or of what is left of it after its second step; every step is a checkpoint."""
    from support import trainers

    begin()
    config = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"), "auto") | {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gather},
    }
    trained = work.adapted("lora")
    settings = SMOOTH | {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    with on_cpus():
        trainer = trainers.trainer(
            Path(folder), trained, deepspeed=config, use_cpu=False, ddp_backend="gloo", **settings
        )
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
        trainer.save_model(f"{folder}/final")
    distributed.barrier()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@contextlib.contextmanager
def on_cpus() -> Iterator[None]:
    """accelerate starts DeepSpeed on accelerators only: here it is told that processes of a CPU are such."""
    import accelerate

    def backend(*_: Any) -> tuple[str, accelerate.DistributedType]:
        return "gloo", accelerate.DistributedType.MULTI_CPU

    own = accelerate.PartialState._prepare_backend
    accelerate.PartialState._prepare_backend = backend
    try:
        yield
    finally:
        accelerate.PartialState._prepare_backend = own
