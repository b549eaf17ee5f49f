"""What two ranks of tests/distributed/test_stages.py do: each has a pipeline stage, or a part of every sequence."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

import peftcore
from peftcore.plugin import ranks
from peftcore.testing import disturb
from support.ranks.tensor_parallel import logits, message_of
from support.ranks.work import TOKENS, farthest, model, values


def layers(method: str = "lora", **fields: Any) -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    peftcore.apply(found, method, target_modules=["0", "2", "4"], **fields)
    disturb(found, "default", seed=1, std=0.3)
    return found


def piped(folder: str) -> dict[str, float | str]:
    """Differences after two steps of a pipeline of two stages, and after the adapter was saved."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    x, y = torch.arange(64.0).view(8, 8).sin(), torch.arange(32.0).view(8, 4).cos()
    alone, whole = layers(r=3), layers(r=3)
    stage = nn.Sequential(*list(whole)[:3]) if ranks.rank() == 0 else nn.Sequential(*list(whole)[3:])
    schedule = ScheduleGPipe(
        PipelineStage(stage, ranks.rank(), 2, torch.device("cpu")), n_microbatches=2, loss_fn=F.mse_loss
    )
    optimizers = [torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1) for each in (alone, stage)]
    for _ in range(2):
        F.mse_loss(alone(x), y).backward()
        schedule.step(x) if ranks.rank() == 0 else schedule.step(target=y)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found: dict[str, float | str] = {"before": farthest(values(whole), values(alone))}
    peftcore.distributed.join_stages(whole, stage)
    found["joined"] = farthest(values(whole), values(alone))
    peftcore.save(whole, folder)
    distributed.barrier()
    again = peftcore.load(peftcore.remove(alone), folder)
    found["loaded"] = (again(x) - whole(x)).abs().max().item()
    found["a copy"] = message_of(lambda: peftcore.distributed.join_stages(whole, nn.Linear(2, 2)))
    shared = layers("vblora", r=3, vector_length=4, num_vectors=11)
    part = nn.Sequential(*list(shared)[:3]) if ranks.rank() == 0 else nn.Sequential(*list(shared)[3:])
    found["shared"] = message_of(lambda: peftcore.distributed.join_stages(shared, part))
    return found


def attention_of_parts(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
    """Causal attention of this rank's tokens to those of all ranks, `[batch, heads, tokens, width]`."""
    groups = q.shape[1] // k.shape[1]
    k, v = (torch.cat(all_gather(each.contiguous()), 2).repeat_interleave(groups, 1) for each in (k, v))
    first, count = ranks.rank() * q.shape[2], k.shape[2]
    mask = torch.arange(count) <= torch.arange(first, first + q.shape[2])[:, None]
    weights = (q @ k.mT * (scale or q.shape[-1] ** -0.5)).masked_fill(~mask, float("-inf")).softmax(-1)
    return weights @ v


def of_tokens() -> dict[str, float | str]:
    """Gradients where each rank has half of every sequence; the methods that `context_parallel` refuses.

    PyTorch has no ring attention on CPUs, so attention gathers keys and values here.
    """
    warnings.simplefilter("ignore")
    found: dict[str, float | str] = {}
    tokens, labels = TOKENS[:, :6], TOKENS[:, 1:7]
    places = torch.arange(6)[None].expand(len(tokens), -1)
    for method, fields in (("lora", {"r": 3}), ("dora", {"r": 3}), ("ia3", {})):
        alone, spread = model(), model()
        for each in (alone, spread):
            torch.manual_seed(7)
            peftcore.apply(each, method, **fields)
            disturb(each, "default", seed=1, std=0.05)
        peftcore.shard(spread)
        F.cross_entropy(alone(input_ids=tokens).logits.flatten(0, 1), labels.flatten()).backward()
        part = [each.chunk(2, 1)[ranks.rank()] for each in (tokens, labels, places)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", attention_of_parts)
            out = spread(input_ids=part[0], position_ids=part[2], use_cache=False).logits
            F.cross_entropy(out.flatten(0, 1), part[1].flatten()).backward()
        found[method] = farthest(values(spread, "grad"), values(alone, "grad"))

    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (2,))
    for method, fields in (
        ("prompt-tuning", {"num_virtual_tokens": 3}),
        ("prefix-tuning", {"num_virtual_tokens": 3}),
        ("reft", {"r": 3}),
        ("alora", {"r": 3, "alora_invocation_tokens": [29]}),
    ):
        adapted = peftcore.apply(model(), method, **fields)
        ids = tokens.clone()
        with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
            found[method] = message_of(partial(adapted, input_ids=ids))
        found[f"{method}, after"] = float(not logits(adapted).isfinite().all())
    return found
