"""Threads: every output is that of one whole model, whatever other threads do to it meanwhile."""

import asyncio
import contextlib
import copy
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.adaptation import concurrency
from peftcore.engine import adapter_parameters, set_trainable

pytestmark = pytest.mark.usefixtures("toys")
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
    peftcore.merge(model)
    time.sleep(0.001)
    peftcore.unmerge(model)


def come_and_go(model: nn.Module) -> None:
    peftcore.activate(model, [])
    peftcore.apply(model, "around", target_modules=["0", "1", "2", "3"], value=5.0, adapter="five")
    peftcore.remove(model, "five")
    peftcore.activate(model, "two")


@pytest.mark.parametrize(
    ("change", "whole"),
    [(switch, {16.0, 81.0}), (merge, {16.0}), (come_and_go, {16.0, 1.0, 625.0})],
    ids=["activate", "merge", "apply and remove"],
)
def test_a_forward_sees_one_model_whole(change: Callable[[nn.Module], None], whole: set[float]) -> None:
    model = two_and_three()
    with calling(lambda: infer(model)) as found:
        meanwhile(found, lambda: change(model))
    assert set(found) <= whole


def test_a_part_that_is_called_directly_too() -> None:
    model = nn.ModuleDict({"part": layers(), "other": layers(1)})
    model.forward = None
    paths = [f"part.{i}" for i in range(4)]
    for name, value in (("two", 2.0), ("three", 3.0)):
        peftcore.apply(model, "around", target_modules=paths, value=value, adapter=name)
        peftcore.activate(model, [])
    with calling(lambda: infer(model["part"])) as found:
        meanwhile(found, lambda: switch(model))
    assert set(found) <= {1.0, 16.0, 81.0}


def test_a_single_layer_is_merged_whole() -> None:
    model = two_and_three(count=1)
    with calling(lambda: infer(model[0])) as found:
        meanwhile(found, lambda: merge(model))
    assert set(found) == {2.0}


def test_trained_parameters_are_exchanged_between_forwards() -> None:
    model = layers()
    names = tuple(f"{i}.weight" for i in range(4))
    peftcore.apply(model, "train", names=names)
    for i in range(4):
        nn.init.constant_(model[i].weight, 2.0)

    def off_and_on() -> None:
        peftcore.activate(model, [])
        peftcore.activate(model, "default")
        with peftcore.disabled(model):
            assert infer(model) == 1.0

    with calling(lambda: infer(model)) as found:
        meanwhile(found, off_and_on)
    assert set(found) <= {1.0, 16.0}


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
        return [await first, await second, found, await change, infer(model)]

    assert asyncio.run(all_of_them()) == [1.0, 1.0, 16.0, None, 81.0]


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


class Own(nn.Module):
    """A model whose forward is not PyTorch's, which torch.compile begins with elsewhere."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("kind", [lambda inner: inner, Own], ids=["of torch", "own"])
def test_calls_of_a_compiled_model_are_calls(kind: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    model = kind(layers(12, nn.Linear))
    for name, value in (("two", 2.0), ("three", 3.0)):
        paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2].isdigit()]
        peftcore.apply(model, "around", target_modules=paths, value=value, adapter=name)
        peftcore.activate(model, [])
    peftcore.activate(model, "two")
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def change() -> None:
        peftcore.merge(model)
        time.sleep(0.001)
        peftcore.unmerge(model)

    infer(compiled)
    peftcore.merge(model)
    infer(compiled)
    peftcore.unmerge(model)
    with calling(lambda: infer(compiled)) as found:
        for _ in range(20):
            change()
        meanwhile(found, change)
    assert set(found) == {2.0**12}


def test_a_hook_may_activate_before_the_layers() -> None:
    model = two_and_three()
    model.register_forward_pre_hook(lambda *_: peftcore.activate(model, "three"))
    assert infer(model) == 81.0


def test_a_hook_that_activates_beside_another_call_is_refused() -> None:
    """Both would wait for the other's end."""
    model = two_and_three()
    inside, done = threading.Event(), threading.Event()
    names = {}

    def hook(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            peftcore.activate(model, "three")
        else:
            pause(inside, done)

    model.register_forward_pre_hook(hook)
    thread = threading.Thread(target=lambda: names.update(other=infer(model)))
    thread.start()
    inside.wait(5)
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot activate adapters within a call of the model while"):
        infer(model)
    done.set()
    thread.join()
    assert names == {"other": 16.0}


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "PATIENCE", 0.05)
    model = two_and_three()
    inside, done = threading.Event(), threading.Event()
    model.register_forward_pre_hook(lambda *_: pause(inside, done))
    thread = threading.Thread(target=infer, args=(model,))
    thread.start()
    inside.wait(5)
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot merge: another thread .* for 0.05 s. Let one thread"):
        peftcore.merge(model)
    done.set()
    thread.join()
    assert infer(model) == 16.0
    merge(model)
    assert infer(model) == 16.0


def test_the_first_apply_refuses_while_another_thread_calls() -> None:
    model = layers()
    inside, done = threading.Event(), threading.Event()
    model.register_forward_pre_hook(lambda *_: pause(inside, done))
    thread = threading.Thread(target=infer, args=(model,))
    thread.start()
    inside.wait(5)
    with pytest.raises(
        peftcore.PeftcoreError, match="cannot apply another adapter: another thread is calling the model"
    ):
        peftcore.apply(model, "around", target_modules=["0"])
    done.set()
    thread.join()
    assert type(model) is nn.Sequential


def test_generate_has_one_adapter_from_the_first_token_to_the_last() -> None:
    model = tiny.llama().eval()
    for name, value in (("a", 30.0), ("b", -30.0)):
        peftcore.apply(model, "around", target_modules=("q_proj", "v_proj"), value=value, adapter=name)
        peftcore.activate(model, [])

    def generate() -> tuple[int, ...]:
        return tuple(model.generate(tiny.TOKENS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist())

    whole = {generate()}
    for name in "ab":
        peftcore.activate(model, name)
        whole.add(generate())
    assert len(whole) == 3
    with calling(generate, threads=1) as found:
        for _ in range(6):
            time.sleep(0.005)
            peftcore.activate(model, "a")
            peftcore.activate(model, "b")
    assert set(found) <= whole


@pytest.mark.parametrize(
    "change",
    [
        lambda m: peftcore.activate(m, "three"),
        lambda m: peftcore.apply(m, "around", target_modules=["0"], adapter="new"),
        lambda m: peftcore.remove(m, "two"),
        lambda m: peftcore.merge(m),
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


# Between forward and backward


def gradient(model: nn.Module, name: str) -> list[float]:
    return [p.grad.item() if p.grad is not None else 0.0 for _, p in adapter_parameters(model, name)]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: peftcore.activate(m, "three"),
        lambda m: peftcore.activate(m, []),
        lambda m: peftcore.merge(m),
        lambda m: peftcore.remove(m, "two"),
    ],
    ids=["activate", "rest", "merge", "remove"],
)
@pytest.mark.parametrize(
    "output", [lambda y: y, lambda y: {"loss": y}, lambda y: (None, [y])], ids=["tensor", "dict", "list"]
)
def test_a_backward_whose_gradients_would_be_lost_is_refused(change: Callable, output: Callable) -> None:
    model = two_and_three()
    model.register_forward_hook(lambda module, args, y: output(y))
    found = model(X)
    while not isinstance(found, Tensor):
        found = found["loss"] if isinstance(found, dict) else found[-1]
    change(model)
    with pytest.raises(peftcore.PeftcoreError, match=r"backward\(\) of a forward in which \['two'\] trained"):
        found.sum().backward()


def test_gradients_arrive_where_the_same_adapters_act_again() -> None:
    model = two_and_three()
    loss = model(X).sum()
    with peftcore.disabled(model):
        assert infer(model) == 1.0
    switch(model)
    merge(model)
    loss.backward()
    assert gradient(model, "two") == [8.0] * 4
    loss = model(X).sum()
    with peftcore.disabled(model):
        loss.backward()
    assert gradient(model, "two") == [16.0] * 4


def test_what_is_not_trained_may_change() -> None:
    model = two_and_three()
    set_trainable(model, "two", False)
    x = X.clone().requires_grad_()
    y = model(x)
    peftcore.activate(model, "three")
    y.sum().backward()
    assert x.grad.item() == 16.0


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_part_runs_again_as_in_its_forward(use_reentrant: bool) -> None:
    model = Checkpointed(layers(), use_reentrant)
    peftcore.apply(model, "around", target_modules=["0", "1", "2", "3"])
    x = X.clone().requires_grad_()
    with peftcore.disabled(model):
        base = model(x)
    y = model(x)
    base.sum().backward()
    assert x.grad.item() == 1.0
    with peftcore.disabled(model):
        y.sum().backward()
    assert x.grad.item() == 17.0
    assert gradient(model, "default") == [8.0] * 4


def test_a_checkpointed_part_with_other_adapters_is_refused() -> None:
    model = Checkpointed(layers(), False)
    for name in ("a", "b"):
        peftcore.apply(model, "around", target_modules=["0", "1", "2", "3"], adapter=name)
    peftcore.activate(model, "a")
    y = model(X)
    peftcore.activate(model, ["a", "b"])
    with pytest.raises(peftcore.PeftcoreError, match="a checkpointed part of the model runs again"):
        y.sum().backward()


def test_replicas_of_data_parallel_have_adapters_of_their_own() -> None:
    """What `nn.DataParallel` does with each module, on any device."""

    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 2)
        return replica

    model = two_and_three(count=2)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        assert pool.submit(replicate(model), X).result().item() == (2 * 2 * 2.0) ** 2
        with peftcore.disabled(model):
            replica = replicate(model)
        assert pool.submit(replica, X).result().item() == 2.0**2
    assert infer(model) == 4.0


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)
