"""What two ranks of tests/distributed/test_quantized.py do: 4-bit weights of which each rank has a part."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn

import peftcore
from peftcore.plugin import quantized_layers, ranks
from peftcore.testing import disturb
from support.ranks import work
from support.ranks.bases import base
from support.ranks.tensor_parallel import by_hooks, gradients, logits, message_of, off
from support.ranks.work import farthest, optimizer_of, values

KIND = "blocks"
SKIP = ["lm_head"]
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", LORA),
    "lora, bias": ("lora", {**LORA, "lora_bias": True}),
    "dora": ("dora", LORA),
    "ia3": ("ia3", {}),
    "adapter": ("adapter", {"bottleneck_size": 5}),
    "prefix-tuning": ("prefix-tuning", {"num_virtual_tokens": 3}),
    "bitfit": ("bitfit", {}),
    "oft": ("oft", {"oft_block_size": 8, "target_modules": TARGETS}),
}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "nf4, one scale": {"quant_type": "nf4", "double_quant": False},
    "fp4": {"quant_type": "fp4"},
    "mxfp4": {"quant_type": "mxfp4"},
    "nvfp4": {"quant_type": "nvfp4"},
    "affine4": {"quant_type": "affine4"},
}


def by_plan(folder: str) -> nn.Module:
    return base(folder, KIND, tp_size=2)


def hooked(folder: str) -> nn.Module:
    return by_hooks(folder, KIND)


def quantized(found: nn.Module, **fields: Any) -> nn.Module:
    own = {"blocksize": 32} if fields.get("quant_type") not in ("mxfp4", "nvfp4") else {}
    return peftcore.quantize(found, **{"skip": SKIP, **own, **fields})


def adapted(found: nn.Module, method: str, fields: dict[str, Any]) -> nn.Module:
    torch.manual_seed(7)
    peftcore.apply(found, method, **fields)
    disturb(found, "default", seed=1, std=0.05)
    return found.train()


def weights(found: nn.Module) -> dict[str, Any]:
    return {path: layer.dequantized(torch.float32) for path, layer in quantized_layers(found)}


def formats(folder: str, divided: Callable[[str], nn.Module]) -> dict[str, float]:
    """Differences of weights and of logits from one process, for every format."""
    found = {}
    for name, fields in FORMATS.items():
        alone, spread = quantized(base(folder, KIND), **fields), quantized(divided(folder), **fields)
        found[f"{name}, weights"] = farthest(weights(spread), weights(alone))
        found[f"{name}, logits"] = off(logits(spread), logits(alone))
        with torch.no_grad():
            adapted(spread, "lora", LORA)
            found[f"{name}, merged"] = merging(spread)
        peftcore.dequantize(peftcore.remove(spread))
        peftcore.dequantize(alone)
        found[f"{name}, dense again"] = off(logits(spread), logits(alone))
        assert next(quantized_layers(spread), None) is None
    return found


def merging(spread: nn.Module) -> float:
    """Largest difference that merging into dense weights makes; `unmerge` restores the 4 bits."""
    wanted, before = logits(spread), weights(spread)
    peftcore.merge(spread, dtype=torch.float32, undo=True)
    worst = off(logits(spread), wanted)
    peftcore.unmerge(spread)
    assert all(torch.equal(before[path], weight) for path, weight in weights(spread).items())
    return max(worst, off(logits(spread), wanted))


def methods(folder: str, divided: Callable[[str], nn.Module], cases: list[str]) -> dict[str, float]:
    """Differences of gradients from one process, of logits in files, and between the ranks after steps."""
    found = {}
    for case in cases:
        method, fields = METHODS[case]
        alone = adapted(quantized(base(folder, KIND)), method, fields)
        spread = adapted(quantized(divided(folder)), method, fields)
        found[f"{case}, gradients"] = gradients(alone, spread)
        for each in (alone, spread):
            optimizer = optimizer_of(each)
            for seed in range(2):
                torch.manual_seed(seed)
                work.step(each, work.TOKENS, optimizer)
        everyone: list[Any] = [None] * ranks.count()
        distributed.all_gather_object(everyone, values(spread))
        assert farthest(everyone[0], everyone[1]) == 0.0
        wanted, where = logits(spread), f"{folder}/{divided.__name__}, {case}"
        peftcore.save(spread, where)
        distributed.barrier()
        found[f"{case}, loaded by one"] = off(logits(peftcore.load(quantized(base(folder, KIND)), where)), wanted)
        found[f"{case}, loaded by two"] = off(logits(peftcore.load(quantized(divided(folder)), where)), wanted)
    return found


WAYS: dict[str, Callable[[str], nn.Module]] = {"plan": by_plan, "hooks": hooked}


def of_formats(folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {f"{way}, {name}": value for way in WAYS for name, value in formats(folder, WAYS[way]).items()}


def of_methods(folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    cases = {"plan": list(METHODS), "hooks": ["lora", "dora", "adapter", "prefix-tuning"]}
    return {f"{way}, {name}": value for way in WAYS for name, value in methods(folder, WAYS[way], cases[way]).items()}


REFUSALS = {
    "state_dict": "Save the adapter (peftcore.save), or call peftcore.dequantize(model) first",
    "blocks": "after 36 rows of 36 values, which is not a multiple of the 64 values that share a scale in nf4",
    "columns": "after 32 columns, which is not a multiple of the 64 values that share a scale in nf4",
    "not finite": "contains nan at index [188, 3] and cannot be quantized",
    "divided later": "was sharded after it was quantized",
    "called": "was sharded after it was quantized",
    "a file": "cannot load a 4-bit checkpoint into a tensor-parallel model",
}


def in_other_orders(folder: str) -> dict[str, Any]:
    """4 bits before the division, in a file, merged; and what is refused."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    alone = quantized(base(folder, KIND))
    later = by_hooks(folder, KIND, quantize=quantized)
    found["divided later"] = message_of(lambda: peftcore.apply(later, "lora", **LORA))
    found["called"] = message_of(lambda: logits(later))
    found["later, weights"] = farthest(weights(quantized(later)), weights(alone))
    found["later, logits"] = off(logits(later), logits(alone))
    several = [adapted(each, "lora", LORA) for each in (alone, later)]
    found["later, gradients"] = gradients(*several)
    for each in several:
        peftcore.merge(each, max_error=1e9, undo=True)  # into 4 bits again
    found["merged, weights"] = farthest(weights(later), weights(alone))
    found["merged, logits"] = off(logits(later), logits(alone))

    loaded = peftcore.quantization.load(f"{folder}/{KIND}", blocksize=32, distributed_config={"tp_size": 2})
    found["loaded, logits"] = off(logits(loaded), logits(quantized(base(folder, KIND))))
    found["state_dict"] = message_of(lambda: loaded.state_dict())
    if ranks.rank() == 0:
        quantized(base(folder, KIND)).save_pretrained(f"{folder}/four")
    distributed.barrier()
    found["a file"] = message_of(
        lambda: peftcore.quantization.load(f"{folder}/four", distributed_config={"tp_size": 2})
    )
    found["blocks"] = message_of(lambda: peftcore.quantize(base(folder, "llama", tp_size=2)))
    found["columns"] = message_of(lambda: peftcore.quantize(by_plan(folder)))
    broken: Any = by_plan(folder)
    if ranks.rank() == 1:
        broken.model.layers[1].mlp.up_proj.weight.to_local().data[60 - 128, 3] = torch.nan
    found["not finite"] = message_of(lambda: quantized(broken))
    return found
