"""Two cards (NCCL) that share a model out, next to one: gradients of LoRA on dense and 4-bit layers.

Each rank is a process: python -m card.several BACKEND STORE RANK WAY:KIND ...
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.torch_version import TorchVersion

import peftcore
from card.table import Place, Skip, cases

WAYS = ("DDP", "FSDP2", "tensor_parallel")
KINDS = ("dense", "nf4")
ALL = [f"{way}:{kind}" for way, kind in itertools.product(WAYS, KINDS)]
LIMIT = 1e-4  # of the largest gradient: fp32 sums in another order


@cases(way=WAYS, kind=KINDS, slow=True)
def on_two_cards(place: Place, way: str, kind: str) -> str:
    found = torch.cuda.device_count()
    if found < 2:
        raise Skip(f"needs two cards, found {found}")
    if way == "FSDP2" and kind != "dense" and TorchVersion(torch.__version__) < "2.12":
        raise Skip(f"PyTorch {torch.__version__} cannot shard the integer weights of a quantized base")
    return run([f"{way}:{kind}"], "nccl")


def run(chosen: Sequence[str], backend: str) -> str:
    """Start two ranks for what is chosen, and return what the first one says."""
    paths = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "card.several", backend, f"{folder}/store"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), *chosen],
                env={**os.environ, "PYTHONPATH": paths},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            said = [rank.communicate(timeout=300)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-1500:]
    return said[0].strip().splitlines()[-1]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).relu())
        return y


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def with_lora(kind: str, device: torch.device, divided: bool) -> nn.Module:
    torch.manual_seed(0)
    found: nn.Module = Blocks().to(device)
    if divided:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan: Any = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
        found = parallelize_module(found, init_device_mesh(device.type, (2,)), plan)
    if kind != "dense":
        peftcore.quantize(found, kind, blocksize=32, skip=[])
    peftcore.apply(found, "lora", r=4, target_modules=["up", "down"])
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(found):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return found.train()


def trained(found: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in found.parameters() if parameter.requires_grad]


def difference(way: str, kind: str, rank: int, device: torch.device) -> float:
    """Largest difference of a gradient from one rank's, relative to the largest gradient."""
    rows = torch.randn(8, 5, 64, generator=torch.Generator().manual_seed(2)).to(device)
    alone = with_lora(kind, device, divided=False)
    found = with_lora(kind, device, divided=way == "tensor_parallel")
    spread: Any = found
    if way == "DDP":
        spread = nn.parallel.DistributedDataParallel(found)
    elif way == "FSDP2":
        peftcore.shard(found)
    alone(rows).square().mean().backward()
    spread(rows if way == "tensor_parallel" else rows.chunk(2)[rank]).square().mean().backward()
    pairs = [(p.grad, q.grad) for p, q in zip(trained(alone), trained(found), strict=True)]
    worst, largest = 0.0, 0.0
    for wanted, gradient in pairs:
        assert wanted is not None and gradient is not None
        worst = max(worst, (wanted - gradient).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
    return worst / largest


def main(backend: str, store: str, number: str, *chosen: str) -> None:
    from peftcore.plugin.registry import registry

    if "lora" not in peftcore.methods():  # not installed: from the checkout
        sys.path.append(str(Path(__file__).parents[2] / "plugins" / "peftcore-lora"))
        plugin = importlib.import_module("peftcore_lora")
        registry.register("lora", plugin, distribution="peftcore-lora", version="0.1.0")
    rank = int(number)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    found = {each: difference(*each.split(":"), rank, device) for each in chosen}  # type: ignore[call-arg]  # WAY:KIND
    assert max(found.values()) < LIMIT, found
    peftcore.distributed.finish()
    print(", ".join(f"{each} off by {off:.1g}" for each, off in found.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
