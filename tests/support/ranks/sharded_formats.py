"""What ranks do with models in each 4-bit format: FSDP2 shards, LoRA on them, and state dicts."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore import ops
from peftcore.plugin import sharded
from peftcore.quantization import quantized_layers
from peftcore.testing import disturb
from support import quantized
from support.ranks import work

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "mxfp4": {},
    "nvfp4": {},
    "affine4": {"blocksize": 32},
    "permuted inputs": {},
}


def base(form: str) -> nn.Module:
    """Return a Llama in the format; `permuted inputs`: affine4 as a checkpoint with `g_idx` has it."""
    if form != "permuted inputs":
        return peftcore.quantize(quantized.llama(), form, **FORMATS[form])
    model = base("affine4")
    for _, layer in quantized_layers(model):
        order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(0))
        weight = layer.dequantized(torch.float32)[:, order]
        layer.set_packed_parameter("weight", ops.quantize_affine4(weight, 32)._replace(permutation=order))
    return model


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    peftcore.apply(model, "lora", r=3)
    disturb(model, "default", seed=1, std=0.05)
    return model.train()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the base, whole."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: sharded.whole(t.detach()).clone() for name, t in tensors.items() if "lora" not in name}


def against_one_process(form: str) -> tuple[float, bool]:
    """(largest difference of a gradient from one process, whether the base keeps its bits and is divided)."""
    alone, spread = adapted(base(form)), adapted(base(form))
    peftcore.shard(spread)
    work.backward_alone(alone)
    work.backward_here(spread, spread)
    codes = [p for p in spread.parameters() if p.dtype is torch.uint8]
    divided = all(p.to_local().numel() < p.numel() for p in codes) and len(codes) == 14
    found, wanted = whole(spread), whole(alone)
    kept = found.keys() == wanted.keys() and all(torch.equal(found[name], t) for name, t in wanted.items())
    return work.farthest(work.values(spread, "grad"), work.values(alone, "grad")), divided and kept


def read_in_shards(form: str, dense: str, packed: str) -> list[bool]:
    """Return whether `load_sharded` has the bits of one process, from a dense file and from one in the format."""
    wanted, read = base(form), []
    quant_type = None if form == "permuted inputs" else form
    for folder, kind in ((packed, None), *(((dense, quant_type),) if quant_type else ())):
        options = FORMATS[form] if kind else {}
        shards = peftcore.load_sharded(folder, kind, **options)
        found, exact = whole(shards), whole(wanted)
        read.append(found.keys() == exact.keys() and all(torch.equal(found[name], t) for name, t in exact.items()))
    return read


def table(folders: dict[str, str]) -> dict[str, tuple[float, bool, list[bool]]]:
    """By format: what `against_one_process` and `read_in_shards` return."""
    warnings.simplefilter("ignore")
    return {
        form: (*against_one_process(form), read_in_shards(form, folders["dense"], folders[form]))
        for form in folders
        if form != "dense"
    }


def resumed(form: str, folder: str) -> list[bool]:
    """Save with DCP after a step on shards, load into new shards: whether gradients and the base are equal."""
    import torch.distributed.checkpoint as dcp

    first = adapted(base(form))
    peftcore.shard(first)
    optimizer = work.optimizer_of(first)
    work.step(first, work.mine(), optimizer)
    dcp.save({"training": peftcore.TrainingState(first, optimizer)}, checkpoint_id=folder)
    second = adapted(base(form))
    peftcore.shard(second)
    other = work.optimizer_of(second)
    dcp.load({"training": peftcore.TrainingState(second, other)}, checkpoint_id=folder)
    losses = [work.step(m, work.mine(), o) for m, o in ((first, optimizer), (second, other))]
    return [losses[0] == losses[1], work.farthest(work.values(first), work.values(second)) == 0]
