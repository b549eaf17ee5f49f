"""Bytes that PyTorch's CPU allocator reports of a training step, and those that an estimate predicts."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import peftcore
from peftcore.estimating import Purpose, Step, loop
from peftcore.estimating.checkpointing import checkpoint
from peftcore.plugin import ranks


def predicted(found: peftcore.Estimate) -> int:
    """Return the predicted bytes of tensors at the peak, without those present before the step."""
    own = [i for i, purpose in enumerate(Purpose) if purpose not in (Purpose.KERNELS, Purpose.KEPT)]
    return max(sum(sizes[i] for i in own) for _, sizes in found.timeline) - staying(found)


def staying(found: peftcore.Estimate) -> int:
    """Return the predicted bytes of tensors that are present before the step."""
    return sum(storage.bytes for storage in found.storages if storage.born == 0 and storage.died is None)


def most_of(profile: Any) -> int:
    """Return the peak of allocated bytes since the profile began."""
    held = most = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def allocated(model: nn.Module, step: Step) -> int:
    """Return the bytes that a real step after the first adds at its peak, on this rank."""
    rows = loop.make_inputs(model, step.batch_size, step.length)
    inputs = {n: torch.rand(v.shape, dtype=v.dtype) if v.is_meta else v for n, v in rows.items()}
    called = spread(model, step)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = loop.make_optimizer(parameters, step.optimizer)

    def train() -> None:
        for _ in range(step.gradient_accumulation):
            loss = called(**inputs).loss
            if peftcore.engine.state_of(model) is not None:
                loss = loss + peftcore.extra_loss(model)
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if peftcore.engine.state_of(model) is not None:
            peftcore.after_step(model, 1, 1000, optimizer=optimizer)
        optimizer.zero_grad()

    for _ in range(2 if step.ranks > 1 else 1):  # DDP builds its buckets again in the second
        train()
    gc.collect()
    with without_onednn(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        train()
    return most_of(profile)


def allocated_with(model: nn.Module, loss: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that a real step with this loss, after the first, adds at its peak."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = loop.make_optimizer(parameters, "adamw_torch")

    def train() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    train()
    gc.collect()
    with without_onednn(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        train()
    return most_of(profile)


@contextmanager
def without_onednn() -> Iterator[None]:
    """Make PyTorch multiply without oneDNN within the block.

    What oneDNN takes inside a product in 16 bits depends on the processor: nothing with AVX2, and with bf16
    instructions more than a tiny product's result. The profiler reports it, and it belongs to no tensor.
    """
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # mkldnn.flags(enabled=False) sets TF32 as well, with a warning
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def spread(model: nn.Module, step: Step) -> nn.Module:
    """Return the model distributed over the ranks, as the step asks."""
    if step.is_sharded:
        return peftcore.shard(model, **({} if step.shard is True else dict(step.shard)))  # type: ignore[call-overload]
    if step.copies == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=not step.gradient_checkpointing)


def real(config: Any, method: Any, step: Step, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    """Return a Llama with random weights, and the step's adapters and checkpointing."""
    model = transformers.LlamaForCausalLM._from_config(deepcopy(config), dtype=dtype).train()
    quantize = fields.pop("quantize", None)
    if quantize is not None:
        peftcore.quantize(model, quantize)
    if step.per_sample:
        names = [f"a{number}" for number in range(step.per_sample)]
        for name in names:
            peftcore.apply(model, method, adapter=name, **fields)
        peftcore.activate(model, [names[n % len(names)] for n in range(step.batch_size)], per_sample=True)
    elif method is not None:
        peftcore.apply(model, method, **fields)
    if step.gradient_checkpointing:
        checkpoint(model, step.gradient_checkpointing)
    return peftcore.fuse(model, recompute=step.recompute) if step.fused else model


def on_a_rank(config: Any, method: Any, step: Step, fields: dict[str, Any]) -> tuple[int, int]:
    """Return (bytes that a step adds at its peak, bytes of parameters and buffers) on this rank."""
    return _measured(real(config, method, step, **fields), step)


def divided_on_a_rank(folder: str, cases: dict[str, tuple[Any, Step, dict[str, Any]]]) -> dict[str, tuple[int, int]]:
    """Return the same for a model that transformers divides over the ranks, by case."""
    number, count = str(ranks.rank()), str(ranks.count())
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    found = {}
    for name, (method, step, fields) in cases.items():
        sizes = {"tp_size": step.tp_size} | ({"fsdp_size": step.copies} if step.is_sharded else {})
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=sizes).train()
        if "quantize" in fields:
            peftcore.quantize(model, fields["quantize"])
        peftcore.apply(model, method, **{name: value for name, value in fields.items() if name != "quantize"})
        if step.gradient_checkpointing:
            checkpoint(model, step.gradient_checkpointing)
        found[name] = _measured(model, step)
    return found


def _measured(model: nn.Module, step: Step) -> tuple[int, int]:
    most = allocated(model, step)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return most, sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


class Watch(TrainerCallback):
    """Profiler of a Trainer's last step."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.most = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.last:
            gc.collect()
            self.profile = torch.autograd.profiler.profile(profile_memory=True)
            self.profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.last:
            self.profile.__exit__(None, None, None)
            self.most = most_of(self.profile)


def allocated_by(make: Callable[[TrainerCallback], Any], steps: int = 3) -> int:
    """Return the bytes that the last of a trainer's steps adds at its peak."""
    watch = Watch(steps)
    with without_onednn():
        make(watch).train()
    return watch.most


def peak_beyond_libraries(sizes: dict[str, Any], method: str | None, run: dict[str, Any]) -> int:
    """Return the bytes by which three steps of a Llama raise the peak of this process, which must be new."""
    train_llama({**sizes, "num_hidden_layers": 1, "vocab_size": 320}, method, {**run, "batch_size": 1, "length": 8}, 1)
    gc.collect()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    train_llama(sizes, method, run, 3)
    return _resident("VmHWM") - before


def train_llama(sizes: dict[str, Any], method: str | None, run: dict[str, Any], count: int) -> None:
    """Train a Llama with random weights for so many steps."""
    step = Step(**run)
    model = real(transformers.LlamaConfig(**sizes), method, step)
    inputs = loop.make_inputs(model, step.batch_size, step.length)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = loop.make_optimizer(parameters, step.optimizer)
    for _ in range(count):
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
