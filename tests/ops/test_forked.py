"""Kernels and adapters in a process that was forked after their use, with one thread, as DataLoader's workers have.

With more threads nothing that PyTorch computes in parallel ends there, its own operators no more than these.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import tiny
import torch
from fuzz.interrupted import flat, operators, same
from torch import Tensor

import peftcore
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
        peftcore.merge(model)
        peftcore.unmerge(model)
        peftcore.remove(model, "two")
        peftcore.activate(model, "one")
        return right and same(flat(gradients()), wanted)

    assert in_fork(work)
    assert same(flat(gradients()), wanted)
