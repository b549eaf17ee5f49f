"""What ranks of tests/distributed/test_experts.py do: LoRA on experts of which each rank has some."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn

import peftcore
from peftcore.plugin import OnWeight, ranks, sharded
from peftcore.testing import disturb
from support import tiny
from support.ranks import work
from support.ranks.bases import base
from support.ranks.tensor_parallel import logits, message_of, off
from support.ranks.work import TOKENS, farthest, values

KIND = "qwen3_moe"
WAYS = {"one batch": {"tp_size": 2, "ep_size": 2}, "two batches": {"fsdp_size": 2, "ep_size": 2}}


def adapted(found: nn.Module, targets: list[str], **fields: Any) -> nn.Module:
    torch.manual_seed(7)
    peftcore.apply(found, "lora", r=3, target_modules=targets, **fields)
    disturb(found, "default", seed=1, std=0.05)
    return found.train()


def trained(found: nn.Module) -> list[nn.Parameter]:
    return [p for p in found.parameters() if p.requires_grad]


def optimizer_of(found: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(found), lr=0.01, eps=1e-3, foreach=False)


def backward(found: nn.Module, way: str) -> None:
    """One batch for all ranks, or a batch for each, of whose losses one process takes the mean."""
    if way == "one batch":
        work.loss(found, TOKENS).backward()
    elif sharded.is_sharded(found):
        work.loss(found, TOKENS.chunk(2)[ranks.rank()]).backward()
    else:
        for rows in TOKENS.chunk(2):
            (work.loss(found, rows) / 2).backward()


def divided(folder: str, way: str, targets: list[str], **fields: Any) -> nn.Module:
    found = adapted(base(folder, KIND, **WAYS[way]), targets, **fields)
    return peftcore.shard(found) if way == "two batches" else found


def of_experts(folder: str, way: str, targets: list[str]) -> dict[str, float]:
    """Differences from one process: gradients, norms, steps, files, and a resumed run."""
    warnings.simplefilter("ignore")
    found: dict[str, float] = {}
    alone, spread = adapted(base(folder, KIND), targets), divided(folder, way, targets)
    parts = [p for p in trained(spread) if sharded.is_dtensor(p)]
    assert parts and all(2 * len(p.to_local()) == len(p) for p in parts)  # a rank has its experts' factors only
    found["logits"] = off(logits(spread), logits(alone))
    optimizers = [optimizer_of(each.train()) for each in (alone, spread)]
    for step in range(2):
        for each in (alone, spread):
            backward(each, way)
        wanted = values(alone, "grad")
        assert max(gradient.abs().max().item() for gradient in wanted.values()) > 1e-4
        found[f"gradients, {step}"] = farthest(values(spread, "grad"), wanted)
        norm = torch.nn.utils.clip_grad_norm_(trained(alone), 1e-2)
        assert norm > 1e-2
        found[f"norm, {step}"] = (peftcore.distributed.clip_grad_norm_(trained(spread), 1e-2) - norm).abs().item()
        found[f"clipped, {step}"] = farthest(values(spread, "grad"), values(alone, "grad"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found[f"step, {step}"] = farthest(values(spread), values(alone))

    where = f"{folder}/adapter"
    peftcore.save(spread, where)
    dcp.save({"training": peftcore.TrainingState(spread, optimizers[1])}, checkpoint_id=f"{where}, state")
    distributed.barrier()
    after = logits(spread)
    found["loaded by one"] = off(logits(peftcore.load(base(folder, KIND), where)), after)
    found["loaded by two"] = off(logits(peftcore.load(base(folder, KIND, **WAYS[way]), where)), after)
    one, two = adapted(base(folder, KIND), targets), divided(folder, way, targets)
    others = [optimizer_of(each) for each in (one, two)]
    dcp.load({"training": peftcore.TrainingState(one, others[0])}, checkpoint_id=f"{where}, state", no_dist=True)
    dcp.load({"training": peftcore.TrainingState(two, others[1])}, checkpoint_id=f"{where}, state")
    for each, optimizer in zip((alone.train(), one, two), (optimizers[0], *others), strict=True):
        backward(each, way)
        optimizer.step()
    found["resumed by one"] = farthest(values(one), values(alone))
    found["resumed by two"] = farthest(values(two), values(alone))
    return found


def refused(folder: str) -> dict[str, str]:
    warnings.simplefilter("ignore")
    dropping = divided(folder, "one batch", ["experts"], lora_dropout=0.1)
    change = [OnWeight("model.layers.0.mlp.experts", "down_proj", Doubled())]
    with tiny.installed(tiny.method("double", lambda *_: change)):
        doubled = message_of(lambda: peftcore.apply(base(folder, KIND, **WAYS["one batch"]), "double"))
    return {
        "dropout": message_of(lambda: work.loss(dropping, TOKENS)),
        "another change": doubled,
        "merge": message_of(lambda: peftcore.merge(dropping, undo=True)),
    }


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight
