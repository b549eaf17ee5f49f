"""What one of many ranks holds, by PyTorch's fake process group: no messages, and tensors on meta."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.plugin import ranks, sharded


def held_by_first(config: Any, count: int) -> dict[str, int]:
    """Bytes of the base and of LoRA's adapter on rank 0 of `count`, after `peftcore.shard`."""
    model = _joined(config, count)
    peftcore.apply(model, "lora", r=16)
    with mock.patch.object(ranks, "check_equal"):  # nobody answers
        peftcore.shard(model)
    return _held(model)


def held_in_mesh(config: Any, count: int, tp_size: int) -> dict[str, int]:
    """The same where tensor parallelism divides the layers over `tp_size` ranks, and FSDP2 shards what each has."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model = _joined(config, count)
    mesh = init_device_mesh("cpu", (count // tp_size, tp_size), mesh_dim_names=("fsdp", "tp"))
    sizes = DistributedConfig(tp_size=tp_size, fsdp_size=count // tp_size)
    plan, _, groups = model._resolve_parallel_plans(sizes)
    apply_tensor_parallelism(model, mesh["tp"], plan)
    for name in groups:
        fully_shard(model.get_submodule(name), mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    with mock.patch.object(ranks, "check_equal"):
        peftcore.apply(model, "lora", r=16)
    return _held(model)


def _joined(config: Any, count: int) -> Any:
    distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _held(model: Any) -> dict[str, int]:
    adapter = {p for _, p in adapter_parameters(model, "default")}
    base = [p for p in model.parameters() if p not in adapter]
    assert all(map(sharded.is_dtensor, base))
    return {
        "base": sum(p.to_local().nbytes for p in base),
        "adapters": sum(p.nbytes for p in adapter),
    }
