"""What ranks do with adapters that share a module or rested, and with terms of the loss. Their processes import it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_modules, adapter_parameters
from peftcore.plugin import AdapterModules, Around, Train, ranks
from peftcore.testing import disturb
from support import tiny
from support.ranks import work


def pull(adapters: Any, config: Any) -> Tensor:
    """Draws what is trained to values of its own, in a way that takes the whole of it."""
    banks = {id(each.bank): each.bank for each in adapters.values()}
    terms = [(bank.trained @ bank.trained.T - torch.eye(2)).square().sum() for bank in banks.values()]
    return torch.stack([*terms, *((a.gate - 3).square().sum() for a in adapters.values())]).sum()


def follow(adapters: Any, config: Any) -> Tensor:
    return torch.stack([each.seen for each in adapters.values()]).sum()


def orthogonal(adapters: AdapterModules, config: Any) -> Tensor:
    """A term of trained base parameters that takes full tensors."""
    terms = [(weight @ weight.T - torch.eye(len(weight))).square().sum() for weight in adapters.trained.values()]
    return 0.01 * torch.stack(terms).sum()


def place_trained(model: nn.Module, *_: Any) -> list[Any]:
    return [Train([f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)])]


class Seeing(tiny.Banked):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        y = super().forward(base, x)
        self.seen = y.square().mean()
        return y


def place_seeing(*arguments: Any) -> list[Any]:
    placements = tiny.PLACES["shared"](*arguments)
    return [Around(p.path, Seeing(p.adapter.bank)) for p in placements]


def adapted(method: str) -> nn.Module:
    found = work.model()
    torch.manual_seed(1)
    return peftcore.apply(found, method).train()


def against_one_process(method: str, how: str) -> tuple[float, ...] | str:
    """Largest difference of a gradient and of a value after each of two steps, from one process on the whole batch."""
    alone, spread = adapted(method), adapted(method)
    bare = spread
    if ranks.rank() == 1:  # which draws other values
        for _, adapter in adapter_modules(bare, "default"):
            adapter.bank.drawn.zero_()
    match how.split():
        case ["ddp"]:
            spread = nn.parallel.DistributedDataParallel(spread)
        case [adapters, *keeping]:
            peftcore.shard(spread, adapter_placement=adapters, reshard_after_forward=not keeping)
    found = []
    for _ in range(2):
        (work.loss(alone, work.TOKENS) + peftcore.extra_loss(alone)).backward()
        value = work.loss(spread, work.mine())
        try:
            (value + peftcore.extra_loss(bare)).backward()
        except peftcore.PeftcoreError as error:
            return str(error)
        found.append(work.farthest(work.values(bare, "grad"), work.values(alone, "grad")))
        for trained in (alone, bare):
            torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.05, foreach=False).step()
            trained.zero_grad()
        found.append(work.farthest(work.values(bare), work.values(alone)))
    return tuple(found)


def all_against_one_process() -> dict[str, tuple[float, ...] | str]:
    warnings.simplefilter("ignore")
    seeing = tiny.method("seeing", place_seeing, loss=follow)
    trained = tiny.method("trained", place_trained, loss=orthogonal)
    with tiny.installed(tiny.method("shared", tiny.PLACES["shared"], loss=pull), seeing, trained):
        return {
            f"{method}, {how}": against_one_process(method, how)
            for method in ("shared", "seeing", "trained")
            for how in ("ddp", "replicate", "replicate keeping", "shard", "shard keeping")
        }


def awakened(how: str, trained_before: bool) -> float:
    """Largest difference of a gradient of an adapter that rested when the model was sharded."""

    def two() -> nn.Module:
        found = peftcore.apply(work.adapted(), "lora", adapter="other", r=2)
        disturb(found, "other", seed=2, std=0.05)
        peftcore.activate(found, "default")
        return found

    alone, spread = two(), peftcore.shard(two(), adapter_placement=how)
    if trained_before:
        work.loss(spread, work.mine()).backward()
    for found in (alone, spread):
        peftcore.activate(found, "other")
    work.backward_alone(alone)
    work.backward_here(spread, spread)
    return work.farthest(work.values(spread, "grad", "other"), work.values(alone, "grad", "other"))


class FirstOfTwo(nn.Module):
    """Two layers, of which the second is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def uncalled() -> tuple[set[str], set[str]]:
    """Layers whose adapters have gradients after a backward pass, and adapters that train."""
    warnings.simplefilter("ignore")
    model = FirstOfTwo()
    for name in ("default", "other"):
        peftcore.apply(model, "lora", adapter=name, r=2, target_modules=["layers.0", "layers.1"])
        disturb(model, name, seed=1, std=0.1)
    peftcore.activate(model, "default")
    peftcore.shard(model)
    model(torch.ones(2, 8)).square().sum().backward()
    named = [(adapter, *each) for adapter in ("default", "other") for each in adapter_parameters(model, adapter)]
    return (
        {f"layers.{i}" for i in range(2) for _, name, p in named if f"layers.{i}." in name and p.grad is not None},
        {adapter for adapter, _, p in named if p.requires_grad},
    )
