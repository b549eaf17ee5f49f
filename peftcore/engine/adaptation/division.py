"""Layers that tensor parallelism divides over the ranks, and adapters on them.

A plan of transformers (`tp_plan`) replaces the forward of a layer's instance; PyTorch's `parallelize_module` gives it
hooks, between which the layer maps DTensors. Its weight is a DTensor, and from outside it maps plain tensors:

    column-wise   weight [out / n, in]   x whole -> y this rank's part, or gathered
    row-wise      weight [out, in / n]   x this rank's part, or whole -> y whole, summed over the ranks

An adapter's parameters are whole and equal on every rank, and so must be their gradients. An adapter that has
`Adapter.on_parts` computes with this rank's part of its tensors. Any other one gets whole inputs and outputs:

    y = part(adapter(x -> gathered(layer(part(x))), gathered(x)))

Whole tensors have whole gradients: where ranks use different parts of one, the backward pass joins their gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.compiler import is_dynamo_compiling

from peftcore.engine.adaptation.chain import OwnForward
from peftcore.engine.adaptation.parallel_hooks import mesh_of_hooks, style_of_hooks
from peftcore.engine.adaptation.rank_agreement import check_batch, check_random
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import OWN_FORWARD, original_forward
from peftcore.plugin import ranks
from peftcore.plugin.adapter import Adapter, Change, implements

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Division:
    """How a plan divides one layer over the ranks of a mesh.

    Args:
        mesh: mesh of one dimension.
        by_rows: the weight is divided along its inputs (row-wise); else along its outputs (column-wise).
        input_in_parts: each rank's input is its part of the last dimension.
        output_in_parts: each rank's output is its part of the last dimension.
        inputs: width of the whole input.
        outputs: width of the whole output.
        dtensors: the layer maps DTensors, between hooks of PyTorch's `parallelize_module`.
    """

    mesh: DeviceMesh
    by_rows: bool
    input_in_parts: bool
    output_in_parts: bool
    inputs: int
    outputs: int
    dtensors: bool = False

    def part(self, whole: Tensor, dim: int = -1) -> Tensor:
        """Return this rank's part of a tensor that is equal on all ranks; its gradient is the whole one."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        dim %= whole.dim()
        replicated = DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
        return replicated.redistribute(placements=[Shard(dim)]).to_local()

    def gathered(self, part: Tensor, width: int) -> Tensor:
        """Return the whole of which each rank has its part of the last dimension, `width` in all."""
        from torch.distributed.tensor import Replicate

        return self._dtensor(part, width).redistribute(placements=[Replicate()]).to_local()

    def _dtensor(self, tensor: Tensor, width: int | None) -> DTensor:
        """Return a DTensor of a whole tensor, or of parts of the last dimension, `width` in all."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if width is None:
            return DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        shape = torch.Size([*tensor.shape[:-1], width])
        stride = torch.empty(shape, device="meta").stride()
        last = [Shard(tensor.dim() - 1)]
        return DTensor.from_local(tensor, self.mesh, last, run_check=False, shape=shape, stride=stride)

    def input_of(self, local: Tensor) -> DTensor:
        """Return the input of a layer that maps DTensors."""
        return self._dtensor(local, self.inputs if self.input_in_parts else None)

    def output_of(self, local: Tensor) -> DTensor:
        """Return the output of a layer that maps DTensors."""
        return self._dtensor(local, self.outputs if self.output_in_parts else None)

    def local_input(self, x: Any) -> Tensor:
        """Return this rank's tensor of the input of a layer that maps DTensors."""
        from torch.distributed.tensor import Replicate, Shard

        wanted = Shard(x.dim() - 1) if self.input_in_parts else Replicate()
        if not ranks.is_dtensor(x) or x.placements not in ((wanted,), (Shard(-1),) if self.input_in_parts else ()):
            raise PeftcoreError(
                f"a layer with an adapter that parallelize_module has divided was given {type(x).__name__} "
                f"{list(getattr(x, 'placements', ()))}, not a DTensor {[wanted]}. Call the layer itself, so that the "
                "hooks of its parallel style run"
            )
        return x.to_local()

    def local_output(self, y: DTensor) -> Tensor:
        """Return this rank's tensor of the output of a layer that maps DTensors, with the ranks' terms summed."""
        from torch.distributed.tensor import Replicate, Shard

        wanted = Shard(y.dim() - 1) if self.output_in_parts else Replicate()
        return y.redistribute(placements=[wanted]).to_local()

    def summed(self, term: Tensor) -> Tensor:
        """Return the sum of all ranks' terms."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        terms = DTensor.from_local(term, self.mesh, [Partial()], run_check=False)
        return terms.redistribute(placements=[Replicate()]).to_local()

    def shared(self, whole: Tensor) -> Tensor:
        """Return `whole`, equal on all ranks, which use it for different outputs: their gradients are summed."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        replicated = DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
        return replicated.to_local(grad_placements=[Partial()])


def has_plan(module: nn.Module) -> bool:
    """Return whether a parallel plan of transformers or `parallelize_module` divides the work of `module`."""
    return plan_of(module) is not None or mesh_of_hooks(module) is not None


def mesh_of_norm(module: nn.Module) -> DeviceMesh | None:
    """Return the mesh over which a plan sums the gradients of a norm of single heads; None for any other module."""
    found = plan_of(module)
    reduce: Any = None if found is None else found.get("_all_reduce_grad")
    if reduce is None:
        return None
    mesh: DeviceMesh = inspect.getclosurevars(reduce).nonlocals["mesh"]
    return mesh


def division_of(module: nn.Module) -> Division | None:
    """Return how a plan divides the layer `module`; None if none does, or in a way that adapters cannot follow."""
    if not (module._forward_pre_hooks or module._forward_hooks or _own_forward(module) is not None):
        return None  # the ordinary case
    by_hooks = style_of_hooks(module)
    if by_hooks is not None:
        return _division_by_hooks(module, *by_hooks)
    found = plan_of(module)
    if found is None or found["mesh"] is None:
        return None
    from torch.distributed.tensor import Replicate, Shard
    from transformers.distributed import tensor_parallel as plans

    style, mesh = found["self"], found["mesh"]
    inside = getattr(found["original_forward"], "__func__", None)
    stored = module._parameters.get("weight")
    weight = None if stored is None else ranks.behind(stored)
    divided = _placement(module, weight, mesh)
    if (
        mesh.ndim != 1
        or inside is not original_forward(module)
        or not isinstance(module, (nn.Linear, nn.Embedding))
        or weight is None
        or divided is None
        or not (weight.is_floating_point() or hasattr(module, "held_part"))
        or not getattr(style, "use_local_output", False)
        or getattr(module, "_hf_quantized_needs_local_tp", False)
    ):
        return None
    last, whole = Shard(-1), Replicate()
    kind = type(style)
    if isinstance(module, nn.Embedding):
        known = kind is plans.EmbeddingParallel
        return Division(mesh, False, False, False, module.num_embeddings, module.embedding_dim) if known else None
    by_rows = kind is plans.RowwiseParallel
    if not by_rows and kind is not plans.ColwiseParallel:
        return None
    given, returned = style.input_layouts, style.output_layouts
    if type(divided) is not Shard or divided.dim % 2 != by_rows:
        return None
    if by_rows and (given not in (last, whole) or returned != whole):
        return None
    if not by_rows and (given != whole or returned not in (last, whole)):
        return None
    return Division(mesh, by_rows, given == last, returned == last, module.in_features, module.out_features)


def _division_by_hooks(module: nn.Module, by_rows: bool, mesh: DeviceMesh) -> Division | None:
    from torch.distributed.tensor import Shard

    stored = module._parameters.get("weight")
    weight = None if stored is None else ranks.behind(stored)
    of_layer = isinstance(module, (nn.Linear, nn.Embedding)) and plan_of(module) is None
    if not of_layer or mesh.ndim != 1 or weight is None:
        return None
    divided = _placement(module, weight, mesh)
    if not (weight.is_floating_point() or hasattr(module, "held_part")) or type(divided) is not Shard:
        return None
    if isinstance(module, nn.Embedding):
        return Division(mesh, False, False, not by_rows, module.num_embeddings, module.embedding_dim, dtensors=True)
    if not isinstance(module, nn.Linear) or divided.dim % 2 != by_rows:
        return None
    return Division(mesh, by_rows, by_rows, not by_rows, module.in_features, module.out_features, dtensors=True)


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """Return the mesh over which a plan or a parallel style divides the work of `module`; None if none does."""
    found = plan_of(module)
    return mesh_of_hooks(module) if found is None else found["mesh"] or mesh_of_norm(module)


def _placement(module: nn.Module, weight: Tensor | None, mesh: DeviceMesh) -> Any:
    """Return how `mesh` divides the base's weight, also where an adapter's own is in its place; None if it does not.

    FSDP2 divides a weight over other dimensions of a larger mesh, of which `mesh` is the last, and gathers these parts
    before the layer's forward.
    """
    if weight is None or not ranks.is_dtensor(weight):
        held: Any = getattr(module, "held_part", None)
        if held is not None:  # in 4 bits
            return held.placement
        known: dict[str, Sequence[Any]] = getattr(_own_forward(module), "placements", {})
        return next(iter(known.get("weight", ())), None)
    whole, last = weight.device_mesh, weight.device_mesh.ndim - 1
    members = distributed.get_process_group_ranks
    if last and members(whole.get_group(last)) != members(mesh.get_group()):
        return None
    return weight.placements[-1]


def _own_forward(module: nn.Module) -> Any:
    return module.__dict__.get(OWN_FORWARD, module.__dict__.get("forward"))


def plan_of(module: nn.Module) -> dict[str, Any] | None:
    """Return the closure of a plan's forward: `self` (the style), `mesh` and `original_forward`; None without one.

    transformers keeps the style and the mesh of a layer nowhere else: `model.tp_plan` has the styles of a whole model,
    not those that `apply_tensor_parallelism` was called with.
    """
    own = _own_forward(module)
    own = getattr(own, "planned", own)  # inside a `trained_parts.TrainedForward`
    if not inspect.isfunction(own) or own.__name__ != "tp_forward":
        return None
    if not own.__module__.startswith("transformers.distributed"):
        return None
    return {"self": None, "mesh": None, "original_forward": None, **inspect.getclosurevars(own).nonlocals}


class LocalForward(OwnForward):
    """Own forward of a layer that maps DTensors, on local tensors."""

    __slots__ = ("_division", "_own")

    def __init__(self, own: OwnForward, division: Division) -> None:
        self.module, self._own, self._division, self._changes = own.module, own, division, ()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._division.local_output(self._own(self._division.input_of(x), *args, **kwargs))


def on_local(own: OwnForward, division: Division) -> OwnForward:
    """Return the own forward of a divided layer on local tensors."""
    return LocalForward(own, division) if division.dtensors else own


class WholeForward(OwnForward):
    """Own forward of a divided layer, for adapters that read whole inputs and outputs.

    Where they change a weight, every rank gathers it and computes the whole layer.
    """

    __slots__ = ("_division", "_own")

    def __init__(self, own: OwnForward, division: Division, changes: Sequence[Mapping[str, Change]] = ()) -> None:
        self.module, self._division, self._changes = own.module, division, changes
        self._own = own if isinstance(own, LocalForward) else on_local(own, division)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._changes:
            return self._whole()(*args, **kwargs)
        division, (x, *rest) = self._division, args
        y = self._own(division.part(x) if division.input_in_parts else x, *rest, **kwargs)
        return division.gathered(y, division.outputs) if division.output_in_parts else y

    def on_weights(self, changes: Mapping[str, Change]) -> WholeForward:
        """See `Base.on_weights`."""
        return WholeForward(self._own, self._division, (changes, *self._changes))

    def linear_operands(self, x: Tensor) -> None:
        """Return None: this rank has only a part of the weight."""

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return the whole weight and bias, see `ChainLink.weight_and_bias`. Collective."""
        return self._whole().weight_and_bias()

    def _whole(self) -> OwnForward:
        """Return the forward of the layer's class, with changes, on gathered parameters. Collective."""
        module = self.module
        copy: nn.Module = object.__new__(type(module))
        parameters: dict[str, Any] = {
            name: None if each is None else _whole(ranks.behind(each)) for name, each in module._parameters.items()
        }
        copy.__dict__.update(module.__dict__, _parameters=parameters)
        if hasattr(module, "held_part"):
            parameters["weight"] = module.dequantized_parameter("weight", torch.float32)  # type: ignore[operator]
        return OwnForward(copy, original_forward(module), None, self._changes)


def _whole(parameter: Tensor) -> Tensor:
    return ranks.whole(parameter) if ranks.is_part(parameter) else parameter  # one that is trained keeps its gradient


class DividedChain:
    """Chain of a divided layer: takes and returns what its plan does, and gives the adapters what they need.

    Args:
        division: how the layer is divided.
        chain: the adapters around a `WholeForward`.
        parts: (base, x) -> y of the adapters on this rank's part, or None if one of them needs the whole.
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


def on_parts(adapter: nn.Module) -> bool:
    """Return whether `adapter` computes with this rank's part: its class has `on_parts` of its `forward`."""
    if not implements(adapter, Adapter.on_parts) or adapter._forward_hooks or adapter._forward_pre_hooks:
        return False
    return _definer(type(adapter), "forward") is _definer(type(adapter), "on_parts")


def _definer(kind: type, name: str) -> type:
    return next(each for each in kind.__mro__ if name in each.__dict__)


def watch_batches(model: nn.Module) -> RemovableHandle | None:
    """Raise a PeftcoreError in a training call of `model` unless all ranks of its plan are given the same batch.

    The first call that passes ends the check. An embedding that is divided by its vocabulary would mix their tokens.
    """
    mesh = next((mesh for module in model.modules() if (mesh := mesh_of(module)) is not None), None)
    if mesh is None:
        return None

    def check(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and not is_dynamo_compiling() and check_batch((args, kwargs), mesh):
            handle.remove()

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    return handle
