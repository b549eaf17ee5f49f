"""Ctrl-C at random times: COUNT interrupts of operators, optimizers and models with adapters.

    cd tests; python -m fuzz.interrupted COUNT [SEED]

The signal comes from an interval timer, whose handler raises KeyboardInterrupt as Python's does for SIGINT. After each
the same call must give the same bits, an optimizer must have done a step or not, and a model must compute, train and
change its adapters as one that nobody stopped.
"""

from __future__ import annotations

import copy
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import tiny
import torch
from paged import PAGE
from torch import nn

import peftcore
from peftcore import ops, optim
from peftcore.ops.swiglu import swiglu
from peftcore.testing import disturb


class Interrupts:
    """Runs functions, of which the timer stops some."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.count = 0
        self.seconds: dict[str, float] = {}
        signal.signal(signal.SIGALRM, signal.default_int_handler)

    def run(self, name: str, function: Callable[[], Any]) -> tuple[bool, Any]:
        """(whether it was stopped, what it returned). The time is drawn from its own, taken at the first call."""
        if name not in self.seconds:
            began = time.perf_counter()
            found = function()
            self.seconds[name] = time.perf_counter() - began
            return False, found
        delay = self.random.uniform(0, 1.2) * self.seconds[name]
        try:
            signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
            found = function()
            signal.setitimer(signal.ITIMER_REAL, 0)
            return False, found
        except KeyboardInterrupt:
            torch.set_grad_enabled(True)  # an interrupt inside of PyTorch's `no_grad().__exit__` leaves it off
            self.count += 1
            return True, None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


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


def run_operators(interrupts: Interrupts, count: int) -> None:
    calls = operators()
    wanted = {name: flat(call()) for name, call in calls.items()}
    while interrupts.count < count:
        for name, call in calls.items():
            stopped, found = interrupts.run(name, call)
            assert same(flat(call() if stopped else found), wanted[name]), name


KINDS = [
    (optim.PagedAdamW, optim.AdamW),
    (optim.PagedAdamW8bit, optim.AdamW8bit),
    (optim.PagedLion, optim.Lion),
    (optim.PagedSGD, optim.SGD),
]


def run_optimizers(interrupts: Interrupts, count: int) -> dict[str, int]:
    """Beside each a resident one that nothing stops, which does the steps that were done."""
    generator = torch.Generator().manual_seed(0)

    def parameters() -> list[nn.Parameter]:
        torch.manual_seed(1)
        return [nn.Parameter(torch.randn(size)) for size in (3000, 17, 20_000, 1, 9000)]

    outcomes = {"done": 0, "not begun": 0}
    pairs = []
    for paged, resident in KINDS:
        for kind, options in ((paged, {"budget": 4 * PAGE, "page_bytes": PAGE}), (resident, {})):
            mine, others = parameters(), parameters()
            pairs.append((f"{kind.__name__}", kind(mine, **options), mine, resident(others), others))
    while interrupts.count < count:
        for name, optimizer, mine, other, others in pairs:
            for p, q in zip(mine, others, strict=True):
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = p.grad.clone()
            before = [p.detach().clone() for p in mine]
            stopped, _ = interrupts.run(name, optimizer.step)
            torch.set_grad_enabled(True)  # which PyTorch's no_grad leaves off, if it is stopped as it begins
            if stopped and same([p.detach() for p in mine], before):
                outcomes["not begun"] += 1
                for p, q in zip(mine, others, strict=True):  # which may count it, if it was about to begin
                    other.state[q]["step"] = optimizer.state[p]["step"]
                continue
            outcomes["done"] += stopped
            other.step()
            assert all(map(torch.equal, mine, others)), f"{name}: another step"
    return outcomes


def run_model(interrupts: Interrupts, count: int) -> None:
    """A model with two adapters, called, trained and changed; after each stop it does all of it once."""
    base = tiny.llama()
    model: Any = tiny.llama()
    for adapter, seed in (("one", 1), ("two", 2)):
        peftcore.apply(model, "lora", adapter=adapter, r=4)
        disturb(model, adapter, seed=seed, std=0.1)
    peftcore.activate(model, "one")
    tokens = tiny.TOKENS

    def logits() -> list[Any]:
        with torch.no_grad():
            return [model(input_ids=tokens).logits]

    def gradients() -> list[Any]:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    def generate() -> list[Any]:
        return [model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)]

    def switch() -> list[Any]:
        peftcore.activate(model, "two")
        found = logits()
        peftcore.activate(model, "one")
        return found

    def disabled() -> list[Any]:
        with peftcore.disabled(model):
            return logits()

    calls = {"logits": logits, "gradients": gradients, "generate": generate, "switch": switch, "disabled": disabled}
    wanted = {name: flat(call()) for name, call in calls.items()}
    with torch.no_grad():
        assert torch.equal(wanted["disabled"][0], base(input_ids=tokens).logits)
    keys = list(copy.deepcopy(model).state_dict())
    while interrupts.count < count:
        for name, call in calls.items():
            stopped, found = interrupts.run(name, call)
            if not stopped:
                assert same(flat(found), wanted[name]), name
                continue
            torch.set_grad_enabled(True)  # which PyTorch's no_grad leaves off, if it is stopped as it begins
            if name == "switch":
                peftcore.activate(model, "one")
            for other, again in calls.items():
                after = f"{other} after {name} was stopped"
                try:
                    assert same(flat(again()), wanted[other]), after
                except Exception as error:
                    raise AssertionError(f"{after}: {type(error).__name__}: {error}") from error
            assert list(model.state_dict()) == keys


def main(count: str, seed: str = "0") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    interrupts = Interrupts(int(seed))
    each = int(count) // 3
    run_operators(interrupts, each)
    print(f"operators: {interrupts.count} interrupts", flush=True)
    outcomes = run_optimizers(interrupts, 2 * each)
    print(f"optimizers: {interrupts.count - each} interrupts, {outcomes}", flush=True)
    torch.set_num_threads(1)  # two wait for one another in layers as small as these
    run_model(interrupts, int(count))
    print(f"models: {interrupts.count - 2 * each} interrupts")
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
