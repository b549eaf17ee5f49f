"""What a rank holds under DeepSpeed's ZeRO, on CPUs. In a module of its own, since the ranks' processes import it."""

from __future__ import annotations

import gc
from dataclasses import asdict
from typing import Any

import rank_zero
import torch
from step_memory import most_of, real, without_onednn
from transformers import LlamaConfig

from peftcore.estimating import Step, loop

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=3, vocab_size=320)
ON_TWO: dict[str, Any] = {"batch_size": 2, "length": 24, "ranks": 2}
NEAR = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
CASES: dict[str, tuple[Any, Step, dict[str, Any]]] = {
    "zero1": ("lora", Step(**ON_TWO, shard="zero1"), {}),
    "zero1, every parameter": (None, Step(**ON_TWO, shard="zero1"), {}),
    "zero2": ("lora", Step(**ON_TWO, shard="zero2"), {}),
    "zero2, bf16": ("lora", Step(**ON_TWO, shard="zero2", mixed_precision="bf16"), {}),
    "zero2, 4 bits": ("qlora", Step(**ON_TWO, shard="zero2"), {}),
    "zero2, every parameter": (None, Step(**ON_TWO, shard="zero2"), {}),
    "zero3": ("lora", Step(**ON_TWO, shard="zero3"), {}),
    "zero3, parameters released early": ("lora", Step(**ON_TWO, shard=NEAR), {}),
    "zero3, checkpointing": ("lora", Step(**ON_TWO, shard=NEAR, gradient_checkpointing=True), {}),
    "zero3, bf16": ("lora", Step(**ON_TWO, shard="zero3", mixed_precision="bf16"), {}),
    "zero3, two batches": ("lora", Step(**ON_TWO, shard="zero3", gradient_accumulation=2), {}),
    "zero3, 4 bits": ("qlora", Step(**ON_TWO, shard="zero3"), {}),
    "zero3, every parameter": (None, Step(**ON_TWO, shard="zero3"), {}),
}


def all_on_a_rank(names: list[str]) -> dict[str, tuple[int, int]]:
    """Return (bytes between two steps, least peak of two steps) by case."""
    rank_zero.begin()
    return {name: on_a_rank(*CASES[name]) for name in names}


def on_a_rank(method: Any, step: Step, fields: dict[str, Any]) -> tuple[int, int]:
    model = real(CONFIG, method, step, **fields)
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    before = _alive().keys() - own  # such as the tensors by which the model was observed
    engine, inputs = _engine(model, step)

    def train() -> None:
        for _ in range(step.gradient_accumulation):
            loss = engine(**inputs).loss
            engine.backward(loss)
            del loss
            engine.step()

    for _ in range(3):  # in the first two, ZeRO-3 learns the order of the modules
        train()
    held = sum(size for place, size in _alive().items() if place not in before)
    peaks = []
    for _ in range(2):  # gloo's threads give some messages back late
        with without_onednn(), torch.autograd.profiler.profile(profile_memory=True) as profile:
            train()
        peaks.append(most_of(profile))
    engine.destroy()
    return held, held + min(peaks)


def _engine(model: Any, step: Step) -> tuple[Any, dict[str, Any]]:
    assert step.zero is not None
    config = {
        "train_micro_batch_size_per_gpu": step.batch_size,
        "gradient_accumulation_steps": step.gradient_accumulation,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {k: v for k, v in asdict(step.zero.filled(model)).items() if v is not None},
        "bf16": {"enabled": step.mixed_precision == "bf16"},
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)
    engine = rank_zero.begin().initialize(model=model, optimizer=optimizer, config=config)[0]
    return engine, loop.make_inputs(model, step.batch_size, step.length)


def _alive() -> dict[int, int]:
    """Return the bytes of all tensors of this process, by the place of their memory."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor):
            for tensor in (each, each.grad, getattr(each, "ds_tensor", None)):
                if tensor is not None and not tensor.is_meta:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found
