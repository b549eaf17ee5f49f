"""Layers by whose output one sees which adapters acted in each, and threads that call them again and again."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

import peftcore

X = torch.ones(1)


class Yielding(nn.Linear):
    """y = w x; between the layers other threads run."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.0005)
        return super().forward(x)


def layers(count: int = 4, kind: type[nn.Linear] = Yielding) -> nn.Sequential:
    """y = x: a product over layers, so that an output tells which adapters acted in each."""
    model = nn.Sequential(*(kind(1, 1) for _ in range(count)))
    for layer in model:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model.requires_grad_(False)


def two_and_three(**kwargs: Any) -> nn.Module:
    """With 'two' a layer is a factor of 2, with 'three' of 3: 16 or 81, and 1 without."""
    model = layers(**kwargs)
    peftcore.apply(model, "around", target_modules=[str(i) for i in range(len(model))], value=2.0, adapter="two")
    peftcore.activate(model, [])
    peftcore.apply(model, "around", target_modules=[str(i) for i in range(len(model))], value=3.0, adapter="three")
    peftcore.activate(model, "two")
    return model


@contextlib.contextmanager
def calling(call: Callable[[], Any], threads: int = 2) -> Iterator[list[Any]]:
    """Threads that call and call again; an error of theirs is raised here."""
    found: list[Any] = []
    done = threading.Event()

    def loop() -> None:
        while not done.is_set():
            found.append(call())

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(loop) for _ in range(threads)]
        try:
            yield found
            time.sleep(0.01)
        finally:
            done.set()
        for each in running:
            each.result()


def meanwhile(found: list[Any], change: Callable[[], None]) -> None:
    """Change and change again, until there are outputs enough."""
    end = time.monotonic() + 10
    while len(found) < 25 and time.monotonic() < end:
        change()
        time.sleep(0.0005)
    assert len(found) >= 25


def infer(model: nn.Module) -> float:
    with torch.no_grad():
        return model(X).item()


def pause(inside: threading.Event, done: threading.Event) -> None:
    inside.set()
    done.wait(5)


def switch(model: nn.Module) -> None:
    peftcore.activate(model, "three")
    time.sleep(0.001)
    peftcore.activate(model, "two")


def merge(model: nn.Module) -> None:
    peftcore.merge(model, undo=True)
    time.sleep(0.001)
    peftcore.unmerge(model)


def come_and_go(model: nn.Module) -> None:
    peftcore.activate(model, [])
    peftcore.apply(model, "around", target_modules=["0", "1", "2", "3"], value=5.0, adapter="five")
    peftcore.remove(model, "five")
    peftcore.activate(model, "two")
