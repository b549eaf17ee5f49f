"""What a user writes, as a type checker sees it; `tests/test_typed.py` runs mypy on this file, and nobody runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peftcore_lora import LoraConfig
from torch import Tensor, nn
from typing_extensions import assert_type

import peftcore
from peftcore.engine.summary import Plan, Summary
from peftcore.plugin import Architecture, Around, Method, StateRules, WeightFormat, hookimpl, targets


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def train_and_keep(folder: Path) -> None:
    net = Net()
    assert_type(peftcore.plan(net, "lora", r=4), Plan)
    assert_type(peftcore.apply(net, "lora", r=4, adapter="first"), Net)
    assert_type(peftcore.apply(net, LoraConfig(r=4), dtype=torch.bfloat16), Net)
    assert_type(peftcore.summary(net), Summary)
    assert_type(peftcore.summary(net).trainable_parameters, int)
    with peftcore.disabled(net) as base:
        assert_type(base, Net)
    peftcore.activate(net, ["first", None], per_sample=True)
    assert_type(peftcore.save(net, folder), Path)
    assert_type(peftcore.load(Net(), str(folder), trainable=False), Net)
    assert_type(peftcore.merge_error(net), dict[str, float])
    assert_type(peftcore.unmerge(peftcore.merge(net, undo=True)), Net)
    assert_type(peftcore.remove(net), Net)
    assert_type(peftcore.shard(net, adapter_placement="shard"), Net)
    optimizer = peftcore.optim.PagedAdamW8bit(net.parameters(), lr=1e-3)
    assert_type(optimizer, peftcore.optim.PagedAdamW8bit)


def place(model: nn.Module, config: LoraConfig, architecture: Architecture) -> list[Around]:
    assert_type(architecture.hidden_size, int | None)
    chosen = targets.select(model, architecture, target_modules=config.target_modules)
    assert_type(chosen, dict[str, nn.Module])
    return [Around(path, Net()) for path in chosen]


def read(module: nn.Linear) -> Tensor:
    return module.weight


def write(module: nn.Linear, weight: Tensor) -> dict[str, Tensor]:
    return {"weight": weight.to(module.weight.dtype)}


def export(placement: Around) -> Mapping[str, Tensor]:
    return {"w": placement.adapter.get_parameter("weight")}


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="MINE", export=export)
    return [Method("mine", LoraConfig, place, rules, learning_rate=1e-3)]


@hookimpl
def peftcore_weight_formats() -> list[WeightFormat]:
    return [WeightFormat("mine", lambda module: isinstance(module, nn.Linear), read, write)]


def wrong(net: Net) -> None:
    peftcore.aply(net, "lora")  # E: has no attribute "aply"
    peftcore.apply("lora", net)  # E: cannot be "str"
    peftcore.apply(net, "lora", adapter=1)  # E: incompatible type "int"; expected "str"
    peftcore.save(net)  # E: Missing positional argument "path"
    peftcore.load(net, "folder", trainable="no")  # E: incompatible type "str"; expected "bool"
    peftcore.shard(net, adapter_placement="both")  # E: incompatible type "Literal['both']"
    Around("path", 3)  # E: incompatible type "int"; expected Module
    LoraConfig(r="8")  # E: incompatible type "str"; expected "int"
    LoraConfig(bias="some")  # E: incompatible type "Literal['some']"
    print(peftcore.summary(net).trainable)  # E: has no attribute "trainable"
