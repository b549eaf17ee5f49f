"""Kernels and adapters in a process that was forked after their use, with one thread, as DataLoader's workers have.

With more threads nothing that PyTorch computes in parallel ends there, its own operators no more than these.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor

import peftcore
from peftcore import ops
from peftcore.ops.swiglu import swiglu
from peftcore.testing import disturb

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_fork(work: Callable[[], bool]) -> bool | None:
    """What `work` returns in a fork; None where it does not end."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            torch.set_num_threads(1)
            status = 0 if work() else 1
        finally:
            os._exit(status)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(status) in (0, 1)
            return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def operators() -> dict[str, Callable[[], Any]]:
    """Calls of some milliseconds."""
    torch.manual_seed(0)
    x, w = torch.randn(256, 512), torch.randn(1024, 512)
    packed = ops.quantize_4bit(w)
    a, b = torch.randn(16, 512) / 20, torch.randn(1024, 16) / 4
    half, grad = x.bfloat16(), torch.randn(256, 1024)
    gate, up = torch.randn(512, 1024), torch.randn(512, 1024)

    def gradients() -> list[Any]:
        inputs = [t.clone().requires_grad_() for t in (x, a, b)]
        ops.lora_linear(inputs[0], packed, None, inputs[1], inputs[2], 0.5).backward(grad)
        return [t.grad for t in inputs]

    return {
        "quantize": lambda: list(ops.quantize_4bit(w)[:2]),
        "dequantize": lambda: ops.dequantize_4bit(packed),
        "linear_4bit": lambda: ops.linear_4bit(x, packed),
        "linear_4bit in bf16": lambda: ops.linear_4bit(half, packed),
        "one row": lambda: ops.linear_4bit(half[:1], packed),
        "lora_linear": lambda: ops.lora_linear(x, w, None, a, b, 0.5),
        "gradients": gradients,
        "dense_linear": lambda: ops.dense_linear(half, w.bfloat16()),
        "swiglu": lambda: swiglu(torch.cat([gate, up], 1)),
    }


def flat(found: Any) -> list[Any]:
    return [t.clone() for t in (found if isinstance(found, list | tuple) else [found]) if isinstance(t, torch.Tensor)]


def same(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_operators() -> None:
    calls = operators()
    wanted = {name: flat(call()) for name, call in calls.items()}
    assert in_fork(lambda: all(same(flat(call()), wanted[name]) for name, call in calls.items()))
    assert all(same(flat(call()), wanted[name]) for name, call in calls.items())


@pytest.mark.usefixtures("two_threads")
def test_a_model_with_adapters() -> None:
    """It computes, trains, and changes its adapters; the one that was forked from stays as it is."""
    model = tiny.llama()
    for adapter in ("one", "two"):
        peftcore.apply(model, "lora", adapter=adapter, r=4)
        disturb(model, adapter, seed=len(adapter), std=0.1)
    peftcore.activate(model, "one")

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    wanted = flat(gradients())

    def work() -> bool:
        right = same(flat(gradients()), wanted)
        peftcore.activate(model, "two")
        peftcore.merge(model, undo=True)
        peftcore.unmerge(model)
        peftcore.remove(model, "two")
        peftcore.activate(model, "one")
        return right and same(flat(gradients()), wanted)

    assert in_fork(work)
    assert same(flat(gradients()), wanted)
