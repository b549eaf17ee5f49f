"""Ranks of tests/distributed/test_tensor_parallel.py where FSDP2 or experts' parallelism divides the base, too."""

from __future__ import annotations

import warnings

import torch
from torch import distributed

import peftcore
from peftcore.plugin import ranks
from peftcore.testing import disturb
from support.ranks import work
from support.ranks.bases import base
from support.ranks.tensor_parallel import BOTH, gradients, logits, message_of, off
from support.ranks.work import TOKENS, farthest, values


def of_mesh(folder: str) -> dict[str, float | str]:
    """Adapters on a base that FSDP2 and tensor parallelism divide over 2 x 2 ranks, each pair with its own batch."""
    warnings.simplefilter("ignore")
    found: dict[str, float | str] = {}
    tokens = [29, 5]
    cases = [
        ("trainable-tokens", "tied", {"token_indices": tokens}),
        ("lora", "tied", {**BOTH, "trainable_token_indices": tokens}),
        ("lora", "llama", BOTH),
        ("dora", "llama", BOTH),
        ("prefix-tuning", "llama", {"num_virtual_tokens": 3}),
    ]
    for method, kind, fields in cases:
        name = f"{method}, {kind}"
        alone, spread = base(folder, kind), base(folder, kind, tp_size=2, fsdp_size=2)
        for each in (alone, spread):
            torch.manual_seed(7)
            peftcore.apply(each, method, **fields)
            disturb(each, "default", seed=1, std=0.05)
            each.train()
        peftcore.shard(spread)
        rows = TOKENS.chunk(2)
        for part in rows:
            (work.loss(alone, part) / 2).backward()
        work.loss(spread, rows[ranks.rank() // 2]).backward()
        wanted = values(alone, "grad")
        assert max(gradient.abs().max().item() for gradient in wanted.values()) > 1e-5
        found[f"mesh, {name}"] = farthest(values(spread, "grad"), wanted)
        peftcore.save(spread, f"{folder}/mesh, {name}")
        distributed.barrier()
        loaded = peftcore.load(base(folder, kind), f"{folder}/mesh, {name}")
        found[f"mesh, {name}, loaded"] = off(logits(loaded), logits(spread))
    found["mesh, merge"] = message_of(lambda: peftcore.merge(spread, undo=True))
    peftcore.remove(spread)
    found["mesh, modules"] = message_of(lambda: peftcore.apply(spread, "lora", modules_to_save=["lm_head"]))
    return found


def of_experts(folder: str) -> dict[str, float | str]:
    """Adapters on a base of which each rank has half of the experts, with one batch for both ranks or one for each."""
    warnings.simplefilter("ignore")
    found: dict[str, float | str] = {}
    fields = {"r": 3, "target_modules": ["q_proj", "o_proj"]}
    for name, sizes in {"one batch": {"tp_size": 2, "ep_size": 2}, "two": {"fsdp_size": 2, "ep_size": 2}}.items():
        alone, spread = base(folder, "qwen3_moe"), base(folder, "qwen3_moe", **sizes)
        for each in (alone, spread):
            torch.manual_seed(7)
            peftcore.apply(each, "lora", **fields)
            disturb(each, "default", seed=1, std=0.05)
            each.train()
        if name == "two":
            peftcore.shard(spread)
            work.backward_alone(alone)
            work.backward_here(spread, spread)
            wanted = values(alone, "grad")
            assert max(gradient.abs().max().item() for gradient in wanted.values()) > 1e-5
            found[f"experts, {name}"] = farthest(values(spread, "grad"), wanted)
        else:
            found[f"experts, {name}"] = gradients(alone, spread)
        peftcore.save(spread, f"{folder}/experts")
        distributed.barrier()
        loaded = peftcore.load(base(folder, "qwen3_moe"), f"{folder}/experts")
        found[f"experts, {name}, loaded"] = off(logits(loaded), logits(spread))
    return found
