"""Threads: every output is that of one whole model, whatever other threads do to it meanwhile."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import tiny
from support.threaded_layers import (
    X,
    calling,
    come_and_go,
    infer,
    layers,
    meanwhile,
    merge,
    pause,
    switch,
    two_and_three,
)
from torch import Tensor, nn

import peftcore
from peftcore.engine.adaptation import concurrency

pytestmark = pytest.mark.usefixtures("toys", "switching_often")


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
    whole = torch.compile(model, backend="eager", fullgraph=True)
    infer(whole)
    peftcore.merge(model, undo=True)
    infer(whole)
    peftcore.unmerge(model)

    def change() -> None:
        peftcore.merge(model, undo=True)
        time.sleep(0.001)
        peftcore.unmerge(model)

    # The threads run the graphs compiled above. Without fullgraph=True: PyTorch 2.13 counts its frames in one variable
    # for all threads, and raises "found no compiled frames" when two calls overlap.
    compiled = torch.compile(model, backend="eager")
    with calling(lambda: infer(compiled)) as found:
        for _ in range(20):
            change()
        meanwhile(found, change)
    assert set(found) == {2.0**12}


def test_a_hook_may_activate_before_the_layers() -> None:
    model = two_and_three()

    def hook(*_: Any) -> None:  # `activate` returns the model, which PyTorch would take for the new input
        peftcore.activate(model, "three")

    model.register_forward_pre_hook(hook)
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
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot activate adapters inside a call of the model while"):
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
    with pytest.raises(
        peftcore.PeftcoreError, match=r"cannot merge: another thread .* for 0.05 s. Change adapters while"
    ):
        peftcore.merge(model, undo=True)
    done.set()
    thread.join()
    assert infer(model) == 16.0
    merge(model)
    assert infer(model) == 16.0


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
