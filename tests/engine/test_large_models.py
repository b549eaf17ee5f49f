"""Every method on models of many layers: `apply` is linear in them, and what layers share lies once in memory."""

from __future__ import annotations

import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.ranks import cases, work
from support.whole_run import nightly_but
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore.engine import adapter_modules

DENSE = [case for case, (kind, _, quantized) in cases.CASES.items() if kind == "llama" and not quantized]


def calls_of(call: Callable[[], object]) -> int:
    """Calls of Python's functions and of C's; not of what the collector finalizes of earlier tests."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()
    sys.setprofile(counted)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("case", nightly_but(DENSE, ("lora", "dora", "prefix-tuning")))
def test_apply_is_linear_in_the_layers(case: str) -> None:
    """On a model without memory, as in benchmarks/apply.py: in calls, which no clock disturbs."""
    sizes = {"hidden_size": 36, "intermediate_size": 45, "num_attention_heads": 2, "num_key_value_heads": 2}
    found = []
    for layers in (2, 3, 6, 12):  # the first of them for what is imported
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=97))
        work.combined(model, case)
        found.append(calls_of(lambda model=model: work.apply(model, case)))
    _, few, more, many = found
    assert many - more <= 2.6 * (more - few), f"calls for 2, 3, 6 and 12 layers: {found}"


@pytest.mark.parametrize("case", nightly_but([case for case in DENSE if case != "shira"], cases.KINDS))
def test_what_layers_share_lies_once(case: str) -> None:
    """Frozen tensors that are the same in several layers (banks, bases, indices) are one.

    Not SHiRA's places: a file may have others in each layer.
    """
    found = work.adapted(case)
    places: dict[Any, set[int]] = defaultdict(set)
    for _, adapter in adapter_modules(found, "default"):
        for tensor in frozen(adapter):
            if (tensor == tensor.flatten()[0]).all():  # a state that has just begun
                continue
            key = (tensor.dtype, tuple(tensor.shape), tuple(tensor.flatten().tolist()))
            places[key].add(tensor.untyped_storage().data_ptr())
    twice = [key[:2] for key, storages in places.items() if len(storages) > 1]
    assert not twice, f"in memory more than once: {twice}"


def frozen(adapter: nn.Module) -> Iterator[Tensor]:
    """Tensors of an adapter that it does not train, those that are no buffers included; not those of a few numbers."""
    for module in adapter.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()):
            if isinstance(tensor, Tensor) and not tensor.requires_grad and tensor.numel() > 8:
                yield tensor
