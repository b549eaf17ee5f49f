"""What the ranks of plugins/peftcore-relora/tests do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.plugin import ranks, sharded
from support import tiny

ROWS = torch.randint(3, 90, (4, 7), generator=torch.Generator().manual_seed(3))


def trained(how: str | None, optimizer_class: Any) -> dict[str, Tensor]:
    """Return the tensors after five steps with two restarts, on rows that the ranks divide."""
    torch.manual_seed(0)
    model = peftcore.apply(tiny.llama(), "relora", r=2, restart_every=2, restart_warmup=1, prune_ratio=0.5).train()
    if how is not None:
        peftcore.shard(model, adapter_placement=how)
    own = ROWS.chunk(ranks.count())[ranks.rank()]
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, 6):
        model(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        peftcore.after_step(model, step, 5, optimizer=optimizer)
        optimizer.zero_grad()
    sharded.reshard(model)
    adapter = {name: sharded.whole(parameter).clone() for name, parameter in adapter_parameters(model, "default")}
    return adapter | {name: each.clone() for name, each in model.named_buffers() if ".past_" in name}
