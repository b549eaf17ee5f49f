"""Detect how tensor parallelism shards a layer over the ranks. tensor_parallel_forward.py runs adapters on such layers.

A plan of transformers (`tp_plan`) replaces the forward of the layer instance. PyTorch's `parallelize_module` adds
hooks, between which the layer takes and returns DTensors. In both cases the weight is a DTensor, and callers pass and
get plain tensors:

    column-wise   weight [out / n, in]   x whole -> y this rank's part, or gathered
    row-wise      weight [out, in / n]   x this rank's part, or whole -> y whole, summed over the ranks
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import OWN_FORWARD, original_forward
from peftcore.plugin import sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a plan shards one layer over the ranks of a mesh.

    Args:
        mesh: one-dimensional device mesh.
        by_rows: the weight is sharded along its inputs (row-wise); else along its outputs (column-wise).
        input_in_parts: each rank's input is its shard of the last dimension.
        output_in_parts: each rank's output is its shard of the last dimension.
        inputs: width of the full input.
        outputs: width of the full output.
        dtensors: the layer takes and returns DTensors, between the hooks of PyTorch's `parallelize_module`.
    """

    mesh: DeviceMesh
    by_rows: bool
    input_in_parts: bool
    output_in_parts: bool
    inputs: int
    outputs: int
    dtensors: bool = False

    def part(self, whole: Tensor, dim: int = -1) -> Tensor:
        """Return this rank's shard of a replicated tensor; the backward pass gathers the full gradient."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        dim %= whole.dim()
        replicated = DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
        return replicated.redistribute(placements=[Shard(dim)]).to_local()

    def gathered(self, part: Tensor, width: int) -> Tensor:
        """All-gather a tensor that is sharded along its last dimension; its full width is `width`."""
        from torch.distributed.tensor import Replicate

        return self._dtensor(part, width).redistribute(placements=[Replicate()]).to_local()

    def _dtensor(self, tensor: Tensor, width: int | None) -> DTensor:
        """Return a DTensor made from a full tensor, or from shards of the last dimension with full width `width`."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if width is None:
            return DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        shape = torch.Size([*tensor.shape[:-1], width])
        stride = torch.empty(shape, device="meta").stride()
        placements = [Shard(tensor.dim() - 1)]
        return DTensor.from_local(tensor, self.mesh, placements, run_check=False, shape=shape, stride=stride)

    def input_of(self, local: Tensor) -> DTensor:
        """Return the input as the DTensor that the layer takes."""
        return self._dtensor(local, self.inputs if self.input_in_parts else None)

    def output_of(self, local: Tensor) -> DTensor:
        """Return the output as the DTensor that the layer returns."""
        return self._dtensor(local, self.outputs if self.output_in_parts else None)

    def local_input(self, x: Any) -> Tensor:
        """Return this rank's local tensor of a DTensor input."""
        from torch.distributed.tensor import Replicate, Shard

        expected = Shard(x.dim() - 1) if self.input_in_parts else Replicate()
        if not sharded.is_dtensor(x) or x.placements not in ((expected,), (Shard(-1),) if self.input_in_parts else ()):
            raise PeftcoreError(
                f"an adapted layer under parallelize_module expects a DTensor with placements {[expected]}, but got "
                f"a {type(x).__name__} {list(getattr(x, 'placements', ()))}. Call the layer itself, so that the "
                "hooks of its parallel style run"
            )
        return x.to_local()

    def local_output(self, y: DTensor) -> Tensor:
        """Return this rank's local tensor of a DTensor output, after summing partial results of all ranks."""
        from torch.distributed.tensor import Replicate, Shard

        placement = Shard(y.dim() - 1) if self.output_in_parts else Replicate()
        return y.redistribute(placements=[placement]).to_local()

    def summed(self, term: Tensor) -> Tensor:
        """All-reduce: return the sum over all ranks."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        terms = DTensor.from_local(term, self.mesh, [Partial()], run_check=False)
        return terms.redistribute(placements=[Replicate()]).to_local()

    def shared(self, tensor: Tensor) -> Tensor:
        """Return the replicated `tensor`; the backward pass sums its gradients over the ranks."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        replicated = DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        return replicated.to_local(grad_placements=[Partial()])


def has_plan(module: nn.Module) -> bool:
    """Return whether a plan of transformers or `parallelize_module` shards `module`."""
    return plan_of(module) is not None or mesh_of_hooks(module) is not None


def mesh_of_norm(module: nn.Module) -> DeviceMesh | None:
    """Return the mesh over which a plan sums the gradients of a per-head norm; None for any other module."""
    plan = plan_of(module)
    reduce: Any = None if plan is None else plan.get("_all_reduce_grad")
    if reduce is None:
        return None
    mesh: DeviceMesh = inspect.getclosurevars(reduce).nonlocals["mesh"]
    return mesh


def division_of(module: nn.Module) -> Division | None:
    """Return how a plan shards the layer `module`; None if none does, or in a way that adapters cannot follow."""
    if not (module._forward_pre_hooks or module._forward_hooks or _own_forward(module) is not None):
        return None  # the ordinary case
    by_hooks = style_of_hooks(module)
    if by_hooks is not None:
        return _division_by_hooks(module, *by_hooks)
    plan = plan_of(module)
    return None if plan is None or plan["mesh"] is None else _division_by_plan(module, plan)


def _division_by_hooks(module: nn.Module, by_rows: bool, mesh: DeviceMesh) -> Division | None:
    """Return how `parallelize_module` shards a layer, which takes and returns DTensors between the hooks."""
    from torch.distributed.tensor import Shard

    placement = _placement_of_weight(module, mesh)
    if type(placement) is not Shard or plan_of(module) is not None:
        return None
    if isinstance(module, nn.Embedding):
        return _division(module, mesh, output_in_parts=not by_rows, dtensors=True)
    if placement.dim % 2 != by_rows:
        return None
    return _division(module, mesh, by_rows=by_rows, input_in_parts=by_rows, output_in_parts=not by_rows, dtensors=True)


def _division_by_plan(module: nn.Module, plan: dict[str, Any]) -> Division | None:
    """Return how a plan of transformers, which replaces a layer's forward, shards the layer."""
    from torch.distributed.tensor import Placement, Replicate, Shard
    from transformers.distributed import tensor_parallel as plans

    style, mesh = plan["self"], plan["mesh"]
    placement = _placement_of_weight(module, mesh)
    if placement is None or not _maps_local_tensors(module, plan):
        return None
    if isinstance(module, nn.Embedding):
        return _division(module, mesh) if type(style) is plans.EmbeddingParallel else None
    last_dimension: Placement = Shard(-1)
    full: Placement = Replicate()
    if type(style) is plans.ColwiseParallel:
        by_rows, known_layouts = False, [(full, full), (full, last_dimension)]
    elif type(style) is plans.RowwiseParallel:
        by_rows, known_layouts = True, [(full, full), (last_dimension, full)]
    else:
        return None
    layouts = style.input_layouts, style.output_layouts
    if type(placement) is not Shard or placement.dim % 2 != by_rows or layouts not in known_layouts:
        return None
    return _division(
        module,
        mesh,
        by_rows=by_rows,
        input_in_parts=layouts[0] == last_dimension,
        output_in_parts=layouts[1] == last_dimension,
    )


def _maps_local_tensors(module: nn.Module, plan: dict[str, Any]) -> bool:
    """Return whether a plan's forward takes and returns plain tensors, around the forward of the module's class."""
    inner_forward = getattr(plan["original_forward"], "__func__", None)
    return (
        inner_forward is original_forward(module)
        and getattr(plan["self"], "use_local_output", False)
        and not getattr(module, "_hf_quantized_needs_local_tp", False)
    )


def _division(
    module: Any,
    mesh: DeviceMesh,
    *,
    by_rows: bool = False,
    input_in_parts: bool = False,
    output_in_parts: bool = False,
    dtensors: bool = False,
) -> Division:
    """Return the `Division` of a linear layer or an embedding."""
    is_embedding = isinstance(module, nn.Embedding)
    return Division(
        mesh=mesh,
        by_rows=by_rows,
        input_in_parts=input_in_parts,
        output_in_parts=output_in_parts,
        inputs=module.num_embeddings if is_embedding else module.in_features,
        outputs=module.embedding_dim if is_embedding else module.out_features,
        dtensors=dtensors,
    )


def _placement_of_weight(module: nn.Module, mesh: DeviceMesh) -> Any:
    """Return how a one-dimensional mesh shards the weight of a linear layer or an embedding.

    None for other layers, and for weights that another library has quantized.
    """
    stored = module._parameters.get("weight")
    if mesh.ndim != 1 or stored is None or not isinstance(module, (nn.Linear, nn.Embedding)):
        return None
    weight = sharded.original(stored)
    is_readable = weight.is_floating_point() or hasattr(module, "weight_shard")
    return _placement(module, weight, mesh) if is_readable else None


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """Return the mesh over which a plan or a parallel style shards `module`; None if none does."""
    plan = plan_of(module)
    return mesh_of_hooks(module) if plan is None else plan["mesh"] or mesh_of_norm(module)


def _placement(module: nn.Module, weight: Tensor, mesh: DeviceMesh) -> Any:
    """Return how `mesh` shards the base's weight, even while an adapter's copy replaces it; None if it is not sharded.

    FSDP2 shards a weight over the other dimensions of a larger mesh, whose last dimension is `mesh`, and gathers those
    shards before the layer's forward.
    """
    if not sharded.is_dtensor(weight):
        shard: Any = getattr(module, "weight_shard", None)
        if shard is not None:  # a 4-bit weight
            return shard.placement
        placements: dict[str, Sequence[Any]] = getattr(_own_forward(module), "placements", {})
        return next(iter(placements.get("weight", ())), None)
    weight_mesh, last_dimension = weight.device_mesh, weight.device_mesh.ndim - 1
    members = distributed.get_process_group_ranks
    if last_dimension and members(weight_mesh.get_group(last_dimension)) != members(mesh.get_group()):
        return None
    return weight.placements[-1]


def _own_forward(module: nn.Module) -> Any:
    return module.__dict__.get(OWN_FORWARD, module.__dict__.get("forward"))


def plan_of(module: nn.Module) -> dict[str, Any] | None:
    """Return the closure variables of a plan's forward (`self`, the style; `mesh`; `original_forward`), or None.

    transformers stores the style and mesh of a layer only there: `model.tp_plan` has the styles of the whole model, not
    those passed to `apply_tensor_parallelism`.
    """
    forward = _own_forward(module)
    forward = getattr(forward, "planned", forward)  # inside a `TrainedForward`
    if not inspect.isfunction(forward) or forward.__name__ != "tp_forward":
        return None
    if not forward.__module__.startswith("transformers.distributed"):
        return None
    return {"self": None, "mesh": None, "original_forward": None, **inspect.getclosurevars(forward).nonlocals}


def is_hook(hook: Any) -> bool:
    """Return whether a forward hook belongs to a parallel style."""
    return inspect.isfunction(hook) and str(hook.__module__).startswith("torch.distributed.tensor")


def mesh_of_hooks(module: nn.Module) -> DeviceMesh | None:
    """Return the mesh over which a parallel style shards `module`; None if none does."""
    return next((variables["device_mesh"] for variables in _closures(module) if "device_mesh" in variables), None)


def style_of_hooks(module: nn.Module) -> tuple[bool, DeviceMesh] | None:
    """Return (whether it is row-wise, mesh) of a layer under ColwiseParallel or RowwiseParallel; None for others."""
    styles = [
        (variables["input_fn"], variables["device_mesh"]) for variables in _closures(module) if "input_fn" in variables
    ]
    if len(styles) != 1:
        return None
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    prepare, mesh = getattr(styles[0][0], "func", None), styles[0][1]
    kinds = {ColwiseParallel._prepare_input_fn: False, RowwiseParallel._prepare_input_fn: True}
    return (kinds[prepare], mesh) if prepare in kinds else None


def divides_tokens(model: nn.Module) -> bool:
    """Return whether a style shards activations along a dimension other than the last (sequence parallelism)."""
    for module in model.modules():
        for variables in _closures(module):
            if any(map(_is_of_tokens, variables.values())):
                return True
    return False


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Call `module` without the hooks of parallel styles inside the block."""
    tables = [module._forward_pre_hooks, module._forward_hooks]
    hooks_before = [dict(table) for table in tables]
    for table in tables:
        for key in [key for key, hook in table.items() if is_hook(hook)]:
            del table[key]
    try:
        yield
    finally:
        for table, hooks in zip(tables, hooks_before, strict=True):
            table.clear()
            table.update(hooks)


def _closures(module: nn.Module) -> Iterator[Mapping[str, Any]]:
    """Yield the closure variables of each hook: only there are a layer's style, layouts and mesh stored.

    The placements of the weight do not show how inputs and outputs are sharded (`input_layouts=Shard(1)`).
    """
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if is_hook(hook):
            yield inspect.getclosurevars(hook).nonlocals


def _is_of_tokens(value: Any) -> bool:
    from torch.distributed.tensor import Shard

    if isinstance(value, (tuple, list)):
        return any(map(_is_of_tokens, value))
    if hasattr(value, "func") and hasattr(value, "args"):  # a functools.partial with a style's layouts
        return _is_of_tokens(value.args)
    if type(value).__module__ == "torch.distributed.tensor.parallel.style":
        return any(map(_is_of_tokens, vars(value).values()))
    return type(value) is Shard and value.dim >= 0
