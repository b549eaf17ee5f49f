"""`disabled` is of the thread, task or generator that entered it, and of no other."""

import asyncio
import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.threaded_layers import X, calling, infer, layers, meanwhile, two_and_three
from torch import nn

import peftcore
from peftcore.engine import set_trainable
from peftcore.engine.adaptation import concurrency

pytestmark = pytest.mark.usefixtures("toys", "switching_often")


@pytest.mark.parametrize("kind", ["around", "train"])
def test_disabled_is_of_the_thread_that_entered_it(kind: str) -> None:
    """Both leave in the order in which they came, which left the adapter off for good."""
    model = layers()
    if kind == "train":
        peftcore.apply(model, "train", names=("0.weight",))
        nn.init.constant_(model[0].weight, 16.0)
    else:
        peftcore.apply(model, "around", target_modules=["0", "1", "2", "3"])
    first, second = threading.Event(), threading.Event()
    found = {}

    def one() -> None:
        with peftcore.disabled(model):
            first.set()
            if kind == "around":  # the other one's block would wait for this one's end
                second.wait(5)
            found["one"] = infer(model)

    def two() -> None:
        first.wait(5)
        with peftcore.disabled(model):
            second.set()
            thread.join(5)
            found["two"] = infer(model)

    thread = threading.Thread(target=one)
    other = threading.Thread(target=two)
    thread.start()
    other.start()
    first.wait(5)
    found["beside"] = infer(model)
    thread.join()
    other.join()
    assert found == {"one": 1.0, "two": 1.0, "beside": 16.0}
    assert infer(model) == 16.0


def test_outputs_beside_a_thread_that_disables() -> None:
    model = two_and_three()

    def base() -> float:
        with peftcore.disabled(model):
            return infer(model)

    with calling(lambda: (base(), infer(model)), threads=3) as found:
        time.sleep(0.15)
    assert len(found) > 5
    assert set(found) == {(1.0, 16.0)}


@pytest.mark.parametrize("trains_base", [False, True])
def test_disabled_and_changes_wait_for_each_other_without_end(
    trains_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change waits for open blocks, and the calls in them do not wait for it."""
    monkeypatch.setattr(concurrency, "PATIENCE", 5.0)
    model = two_and_three()
    if trains_base:
        peftcore.activate(model, [])
        peftcore.apply(model, "train", names=("0.weight",), adapter="head")
        nn.init.constant_(model[0].weight, 7.0)

    def base() -> tuple[str, float]:
        with peftcore.disabled(model):
            infer(model)
            return "base", infer(model)

    def change() -> None:
        for name in ("two", *(["head"] if trains_base else []), "three"):
            peftcore.activate(model, name)
            time.sleep(0.001)

    with calling(base, threads=2) as disabled, calling(lambda: infer(model), threads=1) as found:
        meanwhile(found, change)
    assert len(disabled) > 1
    assert set(disabled) == {("base", 1.0)}
    assert set(found) <= {16.0, 81.0, 7.0}


def test_disabled_is_of_an_asyncio_task() -> None:
    model = two_and_three()

    async def base() -> list[float]:
        with peftcore.disabled(model):
            await asyncio.sleep(0.01)
            return [infer(model), await asyncio.to_thread(infer, model)]

    async def both() -> list[Any]:
        async def adapted() -> float:
            await asyncio.sleep(0.005)
            return infer(model)

        return await asyncio.gather(base(), adapted())

    assert asyncio.run(both()) == [[1.0, 1.0], 16.0]


def test_a_change_that_waits_for_a_task_does_not_stop_the_others_of_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "PATIENCE", 5.0)
    model = two_and_three()

    async def base() -> float:
        with peftcore.disabled(model):
            await asyncio.sleep(0.1)
            return infer(model)

    async def all_of_them() -> list[Any]:
        first = asyncio.create_task(base())
        await asyncio.sleep(0.01)
        change = asyncio.create_task(asyncio.to_thread(peftcore.activate, model, "three"))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(base())
        found = infer(model)
        rest = [await first, await second]
        await change
        return [*rest, found, infer(model)]

    assert asyncio.run(all_of_them()) == [1.0, 1.0, 16.0, 81.0]


def test_disabled_in_generators_that_end_in_any_order() -> None:
    model = two_and_three()

    def generator() -> Iterator[float]:
        with peftcore.disabled(model):
            while True:
                yield infer(model)

    one, two = generator(), generator()
    assert (next(one), next(two)) == (1.0, 1.0)
    one.close()
    assert next(two) == 1.0
    two.close()
    assert infer(model) == 16.0


def test_disabled_within_a_forward() -> None:
    model = two_and_three()
    seen = []

    def hook(*_: Any) -> None:
        with peftcore.disabled(model):
            seen.append(model[3](X).item())
        seen.append(model[3](X).item())

    model[1].register_forward_hook(hook)
    assert infer(model) == 16.0
    assert seen == [1.0, 2.0]


def test_disabled_is_seen_by_a_compiled_model() -> None:
    model = two_and_three(kind=nn.Linear)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with torch.no_grad():
        outputs = [compiled(X).item()]
        with peftcore.disabled(model):
            outputs.append(compiled(X).item())
        outputs.append(compiled(X).item())
    assert outputs == [16.0, 1.0, 16.0]
    peftcore.activate(model, "three")
    with torch.no_grad():
        assert compiled(X).item() == 81.0


@pytest.mark.parametrize(
    "change",
    [
        lambda m: peftcore.activate(m, "three"),
        lambda m: peftcore.apply(m, "around", target_modules=["0"], adapter="new"),
        lambda m: peftcore.remove(m, "two"),
        lambda m: peftcore.merge(m, undo=True),
        lambda m: set_trainable(m, "two", False),
        copy.deepcopy,
        lambda m: pickle.dumps(m[0]),
    ],
)
def test_changes_and_copies_inside_disabled_are_refused(change: Callable[[nn.Module], Any]) -> None:
    """A merge there would add the adapter twice; what is activated there would be lost."""
    model = two_and_three()
    with peftcore.disabled(model), pytest.raises(peftcore.PeftcoreError, match=r"inside peftcore.disabled\(model\)"):
        change(model)
    assert infer(model) == 16.0
    change(model)


def test_ctrl_c_as_the_block_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is left: adapters act again, and a change waits for nobody."""
    model = two_and_three()
    before = infer(model)
    real = concurrency.ModelLock.open_block

    def stopped(self: Any, *args: Any) -> None:
        real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(concurrency.ModelLock, "open_block", stopped)
        with pytest.raises(KeyboardInterrupt), peftcore.disabled(model):
            pass
    assert infer(model) == before
    monkeypatch.setattr(concurrency, "PATIENCE", 0.1)
    peftcore.activate(model, "three")
    assert infer(model) == 81
