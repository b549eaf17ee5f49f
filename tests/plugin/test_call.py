"""What adapters read of the call that is running: its arguments, in whatever thread, pass or graph they act."""

import asyncio
import copy
import inspect
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import tiny
from support.checkpointing import enable_checkpointing
from support.tiny import TOKENS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.engine.adaptation.ancestors import lock_of
from peftcore.plugin import Adapter, Around, current_call

A, B = torch.tensor([0, 1]), torch.tensor([2, 1])


class ByTask(Adapter):
    """y = gain[task] · base(x), and gain[0] where the call says no task."""

    needs_call = ("task_ids",)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 5.0]))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        tasks = current_call().get("task_ids")
        y = base(x)
        return y * self.gain[0] if tasks is None else y * self.gain[tasks].view(-1, *[1] * (y.dim() - 1))


class Reads(Adapter):
    """Keeps what the call says."""

    needs_call = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(dict(current_call()))
        return base(*args, **kwargs)


class Asks(Reads):
    needs_call = False


def place(kind: type[nn.Module]) -> Any:
    return lambda model, config, _: [
        Around(path, kind()) for path, m in model.named_modules() if path in config.target_modules
    ]


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    methods = [tiny.method(kind.__name__.lower(), place(kind)) for kind in (ByTask, Reads, Asks)]
    with tiny.installed(*methods):
        yield


QUERIES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def by_task(model: nn.Module | None = None, paths: tuple[str, ...] = QUERIES) -> Any:
    return peftcore.apply(tiny.llama() if model is None else model, "bytask", target_modules=paths)


def logits(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


class Net(nn.Module):
    """Two layers, checkpointed or not; its forward takes no keyword arguments but its own."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor, scale: float = 1.0, *rest: Any) -> Tensor:
        for part in (self.first, self.second):
            if self.use_reentrant is None:
                x = part(x)
            else:
                # Nothing is random here. PyTorch 2.13's get_rng_state in two threads at once can wait forever: it
                # holds the generator's lock while it waits for the interpreter's.
                x = checkpoint(part, x, use_reentrant=self.use_reentrant, preserve_rng_state=False)
        return x * scale


LAYERS = ("first.0", "second.0")
X = torch.linspace(-1, 1, 6).view(2, 3)


def reader(net: nn.Module | None = None, *paths: str) -> tuple[Any, list[dict[str, Any]]]:
    model = peftcore.apply(net or Net(), "reads", target_modules=paths or ("second.0",))
    return model, model.get_submodule((paths or ("second.0",))[0]).peftcore["default"].seen


def test_arguments_have_the_names_of_the_models_forward() -> None:
    model, seen = reader()
    model(X, 2.0, "more", "still")
    model(scale=3.0, x=X)
    assert seen == [{"x": X, "scale": 2.0, "rest": ("more", "still")}, {"scale": 3.0, "x": X}]
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale", "rest"]


def test_a_part_called_alone_has_its_own() -> None:
    model, seen = reader()
    model.second(X)
    model.get_submodule("second.0")(input=X)
    assert seen == [{"input": X}] * 2


def test_the_call_is_read_only_and_ends() -> None:
    model, _ = reader()
    kept: list[Any] = []
    model.second[0].register_forward_hook(lambda *_: kept.append(current_call()))
    model(X)
    assert "x" in kept[0] and len(kept[0]) == 1 and list(kept[0]) == ["x"] and kept[0].get("y", 3) == 3
    with pytest.raises(TypeError):
        kept[0]["x"] = 1
    with pytest.raises(peftcore.PeftcoreError, match="while their model is being called"):
        current_call()


def test_an_error_for_an_adapter_that_did_not_say_so() -> None:
    model = peftcore.apply(Net(), "asks", target_modules=("first.0",))
    with pytest.raises(peftcore.PeftcoreError, match="needs_call = True"):
        model(X)


def test_arguments_of_the_adapters_alone_do_not_reach_the_model() -> None:
    model = by_task(Net(), LAYERS)
    a, b = model(X, task_ids=A), model(X, task_ids=B)
    assert torch.equal(a[1], b[1]) and not torch.equal(a[0], b[0])
    assert torch.equal(model(X, task_ids=torch.zeros(2).long()), model(X))
    with peftcore.disabled(model):
        assert torch.equal(model(X, task_ids=A), Net()(X))
    peftcore.activate(model, [])
    assert torch.equal(model(X, task_ids=A), Net()(X))
    with pytest.raises(TypeError, match="task_id"):
        model(X, task_id=A)
    peftcore.remove(model)
    with pytest.raises(TypeError, match="task_ids"):
        model(X, task_ids=A)


def test_with_another_adapter_left_the_names_go_with_the_adapter() -> None:
    model = by_task(Net(), LAYERS)
    peftcore.apply(model, "reads", target_modules=("first.0",), adapter="other")
    peftcore.remove(model, "default")
    with pytest.raises(TypeError, match="task_ids"):
        model(X, task_ids=A)
    with pytest.raises(peftcore.PeftcoreError, match=r"no adapter on the model reads the argument 'task_ids'\. They"):
        peftcore.call_arguments(model, task_ids=A).__enter__()


def test_call_arguments_hold_for_the_calls_within() -> None:
    model = by_task(Net(), LAYERS)
    a, b = model(X, task_ids=A), model(X, task_ids=B)
    with peftcore.call_arguments(model, task_ids=A):
        assert torch.equal(model(X), a) and torch.equal(model(X), a)
        with peftcore.call_arguments(model, task_ids=B):
            assert torch.equal(model(X), b)
            assert torch.equal(model(X, task_ids=A), a)
            twin = copy.deepcopy(model)
        assert torch.equal(twin(X), model(X, task_ids=torch.zeros(2).long()))
    assert torch.equal(model(X), model(X, task_ids=torch.zeros(2).long()))
    with pytest.raises(peftcore.PeftcoreError, match=r"no adapter .* reads the argument 'task_id'.*'task_ids'"):
        peftcore.call_arguments(model, task_id=A).__enter__()


def test_tasks_of_asyncio_have_their_own() -> None:
    model = by_task(Net(), LAYERS)

    async def run(tasks: Tensor) -> Tensor:
        with peftcore.call_arguments(model, task_ids=tasks):
            await asyncio.sleep(0.001)
            return model(X)

    async def both() -> list[Tensor]:
        return await asyncio.gather(run(A), run(B))

    a, b = asyncio.run(both())
    assert torch.equal(a, model(X, task_ids=A)) and torch.equal(b, model(X, task_ids=B))


@pytest.mark.usefixtures("switching_often")
def test_threads_have_their_own() -> None:
    model = by_task(Net(False), LAYERS)
    model.first[1].register_forward_hook(lambda *_: time.sleep(0.0005))
    x = X.clone().requires_grad_()

    def gradient(tasks: Tensor) -> Tensor:
        return torch.autograd.grad(model(x, task_ids=tasks).sum(), x)[0]

    wanted = {id(tasks): gradient(tasks) for tasks in (A, B)}
    assert not torch.equal(wanted[id(A)], wanted[id(B)])
    with ThreadPoolExecutor(4) as pool:
        for tasks, found in [(tasks, pool.submit(gradient, tasks)) for tasks in (A, B) * 8]:
            assert torch.equal(found.result(), wanted[id(tasks)])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_parts_see_the_call_of_their_forward(use_reentrant: bool) -> None:
    gradients = []
    for how in (None, use_reentrant):
        model = by_task(Net(how), LAYERS)
        x = X.clone().requires_grad_()
        first = model(x, task_ids=A)
        with peftcore.call_arguments(model, task_ids=B):
            second = model(2 * x)
        third = model(3 * x)
        ((first + third).sum() * second.sum()).backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 3
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_transformers(use_reentrant: bool) -> None:
    gradients = []
    for enable in (False, True):
        model = by_task().train()
        if enable:
            enable_checkpointing(model, {"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        losses = [model(TOKENS, labels=TOKENS, task_ids=tasks, use_cache=False).loss for tasks in (A, B)]
        torch.stack(losses).prod().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)
    assert (gradients[0][0] != 0).tolist() == [True, True, True, False]


def test_a_checkpoint_around_the_model() -> None:
    model = by_task(Net(), LAYERS)
    x = X.clone().requires_grad_()
    wanted = torch.autograd.grad(model(x, task_ids=A).sum() + model(x, task_ids=B).sum(), x)[0]
    outputs = [checkpoint(model, x, task_ids=tasks, use_reentrant=False) for tasks in (A, B)]
    torch.testing.assert_close(torch.autograd.grad(sum(outputs).sum(), x)[0], wanted)
    with peftcore.call_arguments(model, task_ids=A):
        output = checkpoint(model, x, use_reentrant=True)
    with pytest.raises(peftcore.PeftcoreError, match=r"the call that it belongs to, .* cannot be identified"):
        output.sum().backward()


def test_a_backward_within_a_call_has_the_call_of_its_forward() -> None:
    model = by_task(Net(False), LAYERS)
    x = X.clone().requires_grad_()
    wanted = torch.autograd.grad(model(x, task_ids=A).sum(), x)[0]
    output, found = model(x, task_ids=A), []
    hook = model.first[1].register_forward_hook(lambda *_: found.append(torch.autograd.grad(output.sum(), x)[0]))
    model(x, task_ids=B)
    hook.remove()
    torch.testing.assert_close(found[0], wanted)


def compiled(model: Any) -> tuple[Any, list[int]]:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=backend), graphs


def test_one_graph_reads_the_call_anew() -> None:
    model = by_task(Net(), LAYERS)
    compiled_model, graphs = compiled(model)
    for tasks in (A, B, A):
        torch.testing.assert_close(compiled_model(X, task_ids=tasks), model(X, task_ids=tasks))
    with peftcore.call_arguments(model, task_ids=B):
        torch.testing.assert_close(compiled_model(X), model(X))
    assert len(graphs) == 1
    torch.testing.assert_close(compiled_model(X), model(X))
    assert len(graphs) == 2


def test_a_graph_around_the_model_reads_the_call_anew() -> None:
    model = by_task(Net(), LAYERS)
    whole, graphs = compiled(lambda x, **kwargs: 2 * model(x, **kwargs))
    for tasks in (A, B):
        torch.testing.assert_close(whole(X, task_ids=tasks), 2 * model(X, task_ids=tasks))
    assert len(graphs) == 1
    for tasks in (A, B):
        with peftcore.call_arguments(model, task_ids=tasks):
            torch.testing.assert_close(whole(X), 2 * model(X))
    torch.testing.assert_close(whole(X), 2 * model(X))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo in Python 3.10 reads it
def test_compiled_parts_that_run_again_see_the_call_of_their_forward() -> None:
    gradients = []
    for compile_parts in (False, True):
        torch._dynamo.reset()
        model = by_task().train()
        enable_checkpointing(model, {"use_reentrant": False})
        if compile_parts:
            for layer in model.model.layers:
                layer.compile(backend="eager")
        sum(model(TOKENS, labels=TOKENS, task_ids=tasks, use_cache=False).loss for tasks in (A, B)).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_each_step_of_generate_has_its_call() -> None:
    model, seen = reader(tiny.llama(), "model.layers.0.self_attn.q_proj")
    model.generate(TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [call["input_ids"].shape[1] for call in seen] == [7, 1, 1]
    assert all(call.get("past_key_values", call.get("cache")) is not None for call in seen)


@pytest.mark.parametrize("make", [tiny.llama, tiny.t5])
def test_generate_repeats_them_for_beams(make: Any) -> None:
    model = make()
    paths = QUERIES
    if model.config.is_encoder_decoder:
        paths = ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q")
    by_task(model, paths)
    how = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    both = model.generate(TOKENS, task_ids=B + 1, **how)
    with peftcore.call_arguments(model, task_ids=B + 1):
        assert torch.equal(model.generate(TOKENS, **how), both)
    for row in range(2):
        alone = model.generate(TOKENS[row : row + 1], task_ids=(B + 1)[row : row + 1], **how)
        assert torch.equal(alone[0], both[row])
    with pytest.raises(ValueError, match=r"not used by the model: \['task_id'\]"):
        model.generate(TOKENS, task_id=B, **how)


def replicate(module: nn.Module) -> nn.Module:
    """What `nn.DataParallel` does with each module, on any device."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicate(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach())
    return replica


def test_replicas_of_data_parallel() -> None:
    model = by_task(Net(), LAYERS)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda tasks: replicate(model)(X, task_ids=tasks), (A, B)))
    assert torch.equal(found[0], model(X, task_ids=A)) and torch.equal(found[1], model(X, task_ids=B))
    with peftcore.call_arguments(model, task_ids=A), pytest.raises(peftcore.PeftcoreError, match="DataParallel"):
        replicate(model)


def test_copies_ask_too() -> None:
    model = by_task(Net(), LAYERS)
    twin, context = copy.deepcopy(model), lock_of(model).context
    assert torch.equal(twin(X, task_ids=B), model(X, task_ids=B))
    peftcore.remove(twin)
    assert pickle.loads(pickle.dumps(context)).names == {"task_ids"}
    assert not torch.equal(model(X, task_ids=B), model(X, task_ids=A))


def test_a_model_within_another_has_its_own_call() -> None:
    inner = by_task(Net(), LAYERS)
    model, seen = reader(Net(), "second.0")
    model.first[1].register_forward_hook(lambda m, args, y: inner(y, task_ids=A))
    model(X)
    assert list(seen[0]) == ["x"] and seen[0]["x"] is X


def test_adapters_of_some_samples_see_the_call_of_those() -> None:
    model = by_task(Net(), LAYERS)
    peftcore.apply(model, "bytask", target_modules=LAYERS, adapter="other")
    with torch.no_grad():
        for _, parameter in peftcore.engine.adapter_parameters(model, "other"):
            parameter.mul_(-3)
    tasks, x, names = torch.tensor([3, 1, 2]), torch.randn(3, 3), ["other", None, "default"]
    wanted = []
    for row, name in enumerate(names):
        peftcore.activate(model, name or [])
        wanted.append(model(x[row : row + 1], task_ids=tasks[row : row + 1]))
    peftcore.activate(model, names, per_sample=True)
    torch.testing.assert_close(model(x, task_ids=tasks), torch.cat(wanted))
    with peftcore.call_arguments(model, task_ids=tasks):
        torch.testing.assert_close(model(x), torch.cat(wanted))
