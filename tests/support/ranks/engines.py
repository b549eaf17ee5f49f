"""What ranks do for tests/distributed/test_engines.py: each engine trains, saves and resumes eight kinds of methods."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn

import peftcore
from peftcore.plugin import ranks
from support import trainers
from support.engine_table import METHODS as NAMES, SAVED
from support.ranks import work, zero3
from support.ranks.cases import CASES

OF_METHODS = ("lora", "qlora", "dora", "ia3", "adapter", "prefix-tuning", "bitfit", "lora, experts in 4 bits")
METHODS = dict(zip(NAMES, OF_METHODS, strict=True))
STEPS = 3  # of which the last one follows a checkpoint


def optimizer_of(found: nn.Module) -> torch.optim.Optimizer:
    """AdamW that does not enlarge the rounding of tiny gradients."""
    return torch.optim.AdamW([p for p in found.parameters() if p.requires_grad], lr=0.01, eps=1e-3, foreach=False)


def step_alone(found: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    work.backward_alone(found)
    optimizer.step()
    optimizer.zero_grad()
    return work.values(found)


def loaded(case: str, folder: str) -> dict[str, Tensor]:
    kind, _, quantized = CASES[case]
    base = work.model(kind)
    if quantized:
        peftcore.quantize(base)
    return work.values(peftcore.load(base, folder))


def begun(engine: str, case: str) -> tuple[nn.Module, nn.Module, Any]:
    """A model with an adapter, as the engine spreads it over the ranks, and its optimizer."""
    found = work.adapted(case)
    if engine == "FSDP2":
        peftcore.shard(found)
    optimizer: Any = optimizer_of(found)
    if engine == "DDP":
        return found, nn.parallel.DistributedDataParallel(found), optimizer
    if engine == "Ray Train":
        from ray.train.torch import prepare_model

        return found, prepare_model(found), optimizer
    if engine == "accelerate":
        from accelerate import Accelerator

        spread, optimizer = Accelerator(cpu=True).prepare(found, optimizer)
        assert isinstance(spread, nn.parallel.DistributedDataParallel)
        return found, spread, optimizer.optimizer
    if engine.startswith("ZeRO"):
        config = zero3.CONFIG | {"zero_optimization": {"stage": int(engine[-1])}}
        return found, zero3.begin().initialize(model=found, optimizer=optimizer, config=config)[0], None
    return found, found, optimizer


def own_loop(engine: str, case: str, folder: str) -> dict[str, float]:
    """DDP, FSDP2, accelerate and Ray: differences after two steps, in the file, and after resuming in one process."""
    alone = work.adapted(case)
    found, spread, optimizer = begun(engine, case)
    of_alone = optimizer_of(alone)
    for _ in range(STEPS - 1):
        wanted = step_alone(alone, of_alone)
        work.backward_here(spread, found)
        optimizer.step()
        optimizer.zero_grad()
    here = work.values(found)
    peftcore.save(found, f"{folder}/adapter")
    dcp.save({"training": peftcore.TrainingState(spread, optimizer)}, checkpoint_id=f"{folder}/state")
    distributed.barrier()
    other = work.adapted(case)
    of_other = optimizer_of(other)
    dcp.load({"training": peftcore.TrainingState(other, of_other)}, checkpoint_id=f"{folder}/state")
    resumed, last = step_alone(other, of_other), step_alone(alone, of_alone)
    assert work.farthest(last, wanted) > 0.001
    return {
        "equal": work.farthest(here, wanted),
        "save": work.farthest(loaded(case, f"{folder}/adapter"), here),
        "resume": work.farthest(resumed, last),
    }


def zero(engine: str, case: str, folder: str) -> dict[str, float]:
    """DeepSpeed's ZeRO: the same, resumed from DeepSpeed's checkpoint on as many ranks."""
    alone = work.adapted(case)
    of_alone = optimizer_of(alone)

    def step(found: nn.Module, spread: Any) -> dict[str, Tensor]:
        torch.manual_seed(ranks.rank())
        spread.backward(work.loss(spread, work.mine()) + peftcore.extra_loss(found))
        spread.step()
        return zero3.values(found)

    found, spread, _ = begun(engine, case)
    for _ in range(STEPS - 1):
        wanted, here = step_alone(alone, of_alone), step(found, spread)
    peftcore.save(found, f"{folder}/adapter")
    spread.save_checkpoint(f"{folder}/state", exclude_frozen_parameters=True)  # type: ignore[operator]
    distributed.barrier()
    other, again, _ = begun(engine, case)
    again.load_checkpoint(f"{folder}/state", load_module_strict=False)
    resumed, last = step(other, again), step_alone(alone, of_alone)
    return {
        "equal": work.farthest(here, wanted),
        "save": work.farthest(loaded(case, f"{folder}/adapter"), here),
        "resume on as many": work.farthest(resumed, last),
    }


def by_trainer(case: str, folder: str, alone: bool) -> dict[str, Tensor]:
    """Adapter after Trainer's steps; `alone`: in one process, from the second checkpoint of two ranks if it exists."""
    there = Path(folder) / f"checkpoint-{STEPS - 1}"
    settings = {"save_strategy": "steps", "save_steps": 1, "adam_epsilon": 1e-3, "max_grad_norm": 0.0}
    count = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 if alone else 1}
    found = work.adapted(case)
    trainer = trainers.trainer(Path(folder), found, **settings, **count)
    trainer.train(resume_from_checkpoint=str(there) if alone and there.exists() else None)
    if not alone:
        trainer.save_model(f"{folder}/adapter")
    return work.values(found)


def by_lightning(case: str, folder: str, alone: bool) -> dict[str, Tensor]:
    """The same by Lightning, with checkpoints as in examples/distributed/lightning_ddp.py."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Tuned(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, found: nn.Module) -> None:
            super().__init__()
            self.found, self.strict_loading = found, False

        def training_step(self, batch: Tensor) -> Tensor:
            parts = work.TOKENS.chunk(2) if alone else [work.mine()]
            return torch.stack([work.loss(self.found, rows) for rows in parts]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.found)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found, there = work.adapted(case), Path(folder) / f"step={STEPS - 1}.ckpt"
    saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    ways = {"devices": 1} if alone else {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=STEPS, callbacks=[saved], **ways, **quiet)
    resumed = str(there) if alone and there.exists() else None
    trainer.fit(Tuned(found), torch.utils.data.DataLoader([torch.zeros(1)] * STEPS), ckpt_path=resumed)
    if not alone:
        peftcore.save(found, f"{folder}/adapter")
    return work.values(found)


def measured(engine: str, case: str, folder: str) -> dict[str, float] | str:
    try:
        if engine.startswith("ZeRO"):
            return zero(engine, case, folder)
        return own_loop(engine, case, folder)
    except peftcore.PeftcoreError as error:
        return str(error)


def environment() -> None:
    """Torchrun's variables, which accelerate and DeepSpeed read."""
    warnings.simplefilter("ignore")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    number, count = str(ranks.rank()), str(ranks.count())
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29534"}


def table(engine: str, folder: str) -> dict[str, dict[str, float] | str]:
    environment()
    return {name: measured(engine, case, f"{folder}/{name}") for name, case in METHODS.items()}


def by_engine(engine: str, folder: str, alone: bool) -> dict[str, dict[str, Tensor]]:
    warnings.simplefilter("ignore")
    train = by_lightning if engine == "Lightning" else by_trainer
    return {name: train(case, f"{folder}/{name}", alone) for name, case in METHODS.items()}


def loaded_of_each(folder: str) -> dict[str, dict[str, Tensor]]:
    return {name: loaded(case, f"{folder}/{name}/adapter") for name, case in METHODS.items()}


def killed(engine: str, folder: str) -> dict[str, str]:
    """What rank 0 raises in `save` of each method after rank 1 has died. Folders must stay as they were."""
    if engine in ("Trainer", "Lightning"):
        return killed_by(_savers_of_trainer(folder) if engine == "Trainer" else _savers_of_lightning(folder), folder)
    environment()
    models = {name: begun(engine, case) for name, case in METHODS.items()}
    return killed_by({name: partial(peftcore.save, found) for name, (found, *_) in models.items()}, folder)


def killed_by(savers: dict[str, Callable[[str], object]], folder: str) -> dict[str, str]:
    def written() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in sorted(Path(folder).rglob("*.safetensors"))}

    for name, save in savers.items():
        save(f"{folder}/{name}")
    distributed.barrier()
    before = written()
    if ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    found = {}
    for name, save in savers.items():
        try:
            save(f"{folder}/{name}")
            found[name] = SAVED
        except peftcore.PeftcoreError as error:
            found[name] = str(error)
    assert len(before) == len(savers) and written() == before
    return found


def _savers_of_trainer(folder: str) -> dict[str, Callable[[str], object]]:
    warnings.simplefilter("ignore")
    found = {name: work.adapted(case) for name, case in METHODS.items()}
    return {name: trainers.trainer(Path(folder), each).save_model for name, each in found.items()}


def _savers_of_lightning(folder: str) -> dict[str, Callable[[str], object]]:
    warnings.simplefilter("ignore")
    by_lightning("lora", folder + "/first", alone=False)  # joins the ranks
    shutil.rmtree(folder + "/first", ignore_errors=True)
    return {name: partial(peftcore.save, work.adapted(case)) for name, case in METHODS.items()}


def zero_on_one_rank(engine: str, folder: str) -> dict[str, str]:
    """What DeepSpeed says where a checkpoint of two ranks is resumed on one."""
    found = {}
    for name, case in METHODS.items():
        _, spread, _ = begun(engine, case)
        try:
            spread.load_checkpoint(f"{folder}/{name}/state", load_module_strict=False)  # type: ignore[operator]
            found[name] = "nothing was raised"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
