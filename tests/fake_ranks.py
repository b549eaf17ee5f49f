"""What one of many ranks holds, by PyTorch's fake process group: no messages, and tensors on meta."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

import peftcore
from peftcore import ranks
from peftcore.engine import adapter_parameters


def held_by_first(config: Any, count: int) -> dict[str, int]:
    """Bytes of the base and of LoRA's adapter on rank 0 of `count`, after `peftcore.shard`."""
    distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    peftcore.apply(model, "lora", r=16)
    with mock.patch.object(ranks, "agree"):  # nobody answers
        peftcore.shard(model)
    adapter = {p for _, p in adapter_parameters(model, "default")}
    base = [p for p in model.parameters() if p not in adapter]
    assert all(map(ranks.is_dtensor, base))
    return {
        "base": sum(p.to_local().nbytes for p in base),
        "adapters": sum(p.nbytes for p in adapter),
    }
