"""Run adapters on layers that tensor parallelism shards over the ranks (tensor_parallel.py).

An adapter's parameters are replicated on all ranks, so their gradients must be equal. An adapter with
`Adapter.on_parts` computes with this rank's shards. Any other adapter gets full inputs and outputs:

    y = part(adapter(x -> gathered(layer(part(x))), gathered(x)))

Where ranks use different shards of a full tensor, the backward pass gathers the full gradient. The same holds for base
parameters that an adapter trains (biases, `modules_to_save`): the plan's forward computes with this rank's shard of the
adapter's full parameter:

    y = layer(x; part(trained parameter), frozen rest)

All ranks must get the same batch and draw the same random numbers; the first training call checks this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_leaves

from peftcore.engine.adaptation.chain import OwnForward
from peftcore.engine.adaptation.tensor_parallel import Division, division_of, mesh_of, mesh_of_norm, plan_of
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import OWN_FORWARD, original_class, original_forward
from peftcore.plugin import sharded
from peftcore.plugin.adapter import Adapter, Change, implements

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.utils.hooks import RemovableHandle


def local_forward(own: OwnForward, division: Division) -> Callable[..., Any]:
    """Return the original forward of a sharded layer on local tensors: `base` of `Adapter.on_parts`."""
    if not division.dtensors:
        return own

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return division.local_output(own(division.input_of(x), *args, **kwargs))

    return forward


class WholeForward(OwnForward):
    """Original forward of a sharded layer, for adapters that read full inputs and outputs.

    If an adapter changes the weight, every rank gathers the weight and computes the full layer.
    """

    __slots__ = ("_division", "_local", "_own")

    def __init__(self, own: OwnForward, division: Division, changes: Sequence[Mapping[str, Change]] = ()) -> None:
        super().__init__(own.module, own._forward, own._weights, changes)
        self._own = own
        self._division = division
        self._local = local_forward(own, division)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._changes:
            return self._whole()(*args, **kwargs)
        division, (x, *other_args) = self._division, args
        y = self._local(division.part(x) if division.input_in_parts else x, *other_args, **kwargs)
        return division.gathered(y, division.outputs) if division.output_in_parts else y

    def on_weights(self, changes: Mapping[str, Change]) -> WholeForward:
        """See `Base.on_weights`."""
        return WholeForward(self._own, self._division, (changes, *self._changes))

    def linear_operands(self, x: Tensor) -> None:
        """Return None, since this rank has only a shard of the weight."""

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return the full weight and bias, see `ChainLink.weight_and_bias`. Collective."""
        return self._whole().weight_and_bias()

    def _whole(self) -> OwnForward:
        """Return the output of the layer's class forward on gathered parameters with the changes applied.

        Collective.
        """
        module = self.module
        copy: nn.Module = object.__new__(type(module))
        parameters: dict[str, Any] = {
            name: None if parameter is None else _whole(sharded.original(parameter))
            for name, parameter in module._parameters.items()
        }
        copy.__dict__.update(module.__dict__, _parameters=parameters)
        if hasattr(module, "weight_shard"):
            parameters["weight"] = module.dequantized_parameter("weight", torch.float32)  # type: ignore[operator]
        return OwnForward(copy, original_forward(module), None, self._changes)


def _is_dtensor(parameter: Tensor | None) -> bool:
    return parameter is not None and sharded.is_dtensor(sharded.original(parameter))


def _whole(parameter: Tensor) -> Tensor:
    # `sharded.whole` would detach, but a full trained parameter needs its gradient.
    return sharded.whole(parameter) if sharded.is_shard(parameter) else parameter


class DividedChain:
    """Chain of a sharded layer: converts between the tensors that the plan passes and those that the adapters need.

    Args:
        division: how the layer is sharded.
        chain: the adapters around a `WholeForward`, for full tensors.
        parts: (base, x) -> y, the adapters on this rank's shards; None if an adapter needs full tensors.
    """

    __slots__ = ("_checked", "_division", "_parts", "chain", "module")

    def __init__(self, division: Division, chain: Any, parts: Callable[..., Any] | None) -> None:
        self.module, self.chain = chain.module, chain
        self._division, self._parts, self._checked = division, parts, False

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.module.training and not self._checked and not is_dynamo_compiling():
            check_random(x.device, self._division.mesh)
            self._checked = True
        division = self._division
        if division.dtensors:
            return division.output_of(self._local(division.local_input(x), *args, **kwargs))
        return self._local(x, *args, **kwargs)

    def _local(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        division = self._division
        if self._parts is not None and not args and not kwargs:
            return self._parts(x)
        y = self.chain(division.gathered(x, division.inputs) if division.input_in_parts else x, *args, **kwargs)
        return division.part(y) if division.output_in_parts else y


def has_on_parts(adapter: nn.Module) -> bool:
    """Return whether `adapter` can compute with this rank's shard: its class defines `on_parts` for its `forward`."""
    if not implements(adapter, Adapter.on_parts) or adapter._forward_hooks or adapter._forward_pre_hooks:
        return False
    return _definer(type(adapter), "forward") is _definer(type(adapter), "on_parts")


def _definer(kind: type, name: str) -> type:
    return next(ancestor for ancestor in kind.__mro__ if name in ancestor.__dict__)


def trains_in_parts(module: nn.Module, name: str) -> bool:
    """Return whether an adapter can train the parameter `name` of a layer under tensor parallelism."""
    parameter = module._parameters.get(name)
    if parameter is None or not sharded.is_dtensor(original_parameter := sharded.original(parameter)):
        return True
    by_plan = division_of(module) is not None and plan_of(module) is not None
    return by_plan and original_parameter.device_mesh.ndim == 1  # otherwise FSDP2 shards it as well


def follow_trained(modules: Iterable[nn.Module]) -> None:
    """Make the forward of sharded layers read an adapter's full parameters while these replace the base's shards."""
    for module in modules:
        slot = _slot(module)
        plan_forward = module.__dict__.get(slot)
        if isinstance(plan_forward, TrainedForward) or plan_of(module) is None:
            continue
        if division_of(module) is not None or mesh_of_norm(module) is not None:
            module.__dict__[slot] = TrainedForward(module, plan_forward)


def unfollow_trained(modules: Iterable[nn.Module]) -> None:
    """Undo `follow_trained`."""
    for module in modules:
        plan_forward = module.__dict__.get(_slot(module))
        if isinstance(plan_forward, TrainedForward):
            module.__dict__[_slot(module)] = plan_forward.planned


class TrainedForward:
    """Forward of a sharded layer that passes this rank's shards of trained parameters to the plan's forward.

    Args:
        module: the layer, with the base's parameters.
        planned: the forward that the plan has set on this instance.
    """

    def __init__(self, module: nn.Module, planned: Any) -> None:
        self.module, self.planned, self._checked = module, planned, False
        self.placements = {
            name: sharded.original(parameter).placements  # type: ignore[attr-defined]
            for name, parameter in module._parameters.items()
            if parameter is not None and _is_dtensor(parameter)
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, mesh = self.module, mesh_of_norm(self.module)
        trained_names = [name for name in self.placements if not _is_dtensor(module._parameters[name])]
        if mesh is not None:
            trained_names = [
                name
                for name, parameter in module._parameters.items()
                if parameter is not None and parameter.requires_grad
            ]
        if not trained_names:
            return self.planned(*args, **kwargs)
        plan = plan_of(module)
        assert plan is not None
        if module.training and not self._checked and not is_dynamo_compiling():
            check_random(args[0].device, mesh or plan["mesh"])
            self._checked = True
        parts = {name: self._part(name, mesh or plan["mesh"]) for name in trained_names}
        copy: Any = object.__new__(original_class(module))
        copy.__dict__.update(module.__dict__, _parameters={**module._parameters, **parts})
        copy.__dict__["forward"] = MethodType(original_forward(module), copy)
        if mesh is None:
            plan["self"].install_forward(copy, mesh or plan["mesh"])
        return copy.forward(*args, **kwargs)

    def _part(self, name: str, mesh: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        full_parameter = self.module._parameters[name]
        assert full_parameter is not None
        replicated = DTensor.from_local(full_parameter, mesh, [Replicate()], run_check=False)
        if name not in self.placements:  # a per-head norm, where each rank has some of the heads
            return replicated.to_local(grad_placements=[Partial()])
        return replicated.redistribute(placements=self.placements[name])


def _slot(module: nn.Module) -> str:
    return OWN_FORWARD if OWN_FORWARD in module.__dict__ else "forward"


def watch_batches(model: nn.Module) -> RemovableHandle | None:
    """Raise a PeftcoreError in a training call of `model` unless all ranks of its plan get the same batch.

    The check stops after the first call that passes it. With different batches, an embedding sharded by vocabulary
    would mix their tokens.
    """
    mesh = next((mesh for module in model.modules() if (mesh := mesh_of(module)) is not None), None)
    if mesh is None:
        return None

    def check(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and not is_dynamo_compiling() and check_batch((args, kwargs), mesh):
            handle.remove()

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    return handle


def check_batch(inputs: Any, mesh: DeviceMesh) -> bool:
    """Return whether `inputs` contain values; raise a PeftcoreError if they differ between ranks. Collective."""
    tensors = [tensor for tensor in tree_leaves(inputs) if isinstance(tensor, Tensor) and tensor.numel()]
    if not tensors:
        return False
    shapes = _number(repr([list(tensor.shape) for tensor in tensors]).encode())
    content = sum(number * _projection(tensor) for number, tensor in enumerate(tensors, 1))
    if max(_spread([shapes, content], mesh)) > 1e-6:
        raise PeftcoreError(
            "the ranks got different batches, but under tensor parallelism they compute one batch together. Give all "
            "ranks the same batch, without a DistributedSampler over these ranks"
        )
    return True


def check_random(device: torch.device, mesh: DeviceMesh) -> None:
    """Raise a PeftcoreError unless the ranks would draw the same random numbers. Collective."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    if _spread([_number(state.numpy().tobytes())], mesh)[0]:
        raise PeftcoreError(
            "the ranks of tensor parallelism have different random states, so dropout would differ between their "
            "copies of the adapter. Use the same seed on all ranks before training: torch.manual_seed(seed)"
        )


def _projection(tensor: Tensor) -> float:
    values = tensor.detach().flatten().to(torch.float64)
    angles = torch.arange(len(values), device=values.device, dtype=torch.float64)
    return (values @ angles.cos() / values.norm().clamp(min=1e-30)).item()


def _number(content: bytes) -> int:
    """Return a number for `content` that float64 represents exactly."""
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big")


def _spread(facts: Sequence[float], mesh: DeviceMesh) -> list[float]:
    """Return the largest difference of each fact between the ranks of `mesh`. Collective."""
    signed_facts = [*facts, *(-fact for fact in facts)]
    extremes = torch.tensor(signed_facts, dtype=torch.float64, device=mesh.device_type)
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group=group)
    differences: list[float] = (extremes[: len(facts)] + extremes[len(facts) :]).tolist()
    return differences
