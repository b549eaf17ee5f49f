"""Forward passes without memory: floats are meta tensors, integers are real.

Shapes, indices and masks decide the control flow, and they are integers: these stay real tensors on the CPU. Weights
and activations are meta tensors. An integer computed from them is 0, the experts that a router chooses are the first
ones, a boolean is False and a number 0.0: any valid value shows where it goes. No random numbers are drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from peftcore.model.base_modules import CHILD, ROWS, TRAINED, base_modules, original_class
from peftcore.plugin import sharded

_STATE = "_peftcore_state"  # of the engine: what is applied to a model
_SMALL = 1 << 16  # an integer tensor with more values is packed weights, not an index
_COMPOSABLE = "__composable_api_state_key"  # of PyTorch: what fully_shard keeps at a module, process groups with it
_LARGEST = 1 - 2**-24  # what every random number is: layers that are dropped at random stay
_FAKE = "FakeTensor"  # for the shapes of DTensors, which take no memory
_WRAPPED = "_c10d_functional::_wrap_tensor_autograd"  # a message with the memory of what it wraps, but for meta tensors
aten = torch.ops.aten

Record = Callable[[Any, tuple[Any, ...], list[Tensor], Any], None]


class MetaFloats(TorchDispatchMode):
    """Within it, operators on meta tensors and small real integers go together; see above.

    Args:
        record: called after each operator with (operator, its arguments, the tensors among them, its output).
        largest_index: integer tensors with more values than this are on meta as well.
    """

    def __init__(self, record: Record | None = None, largest_index: int = _SMALL) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self._record = record
        self._largest = largest_index

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for each in types:
            if each.__name__ == "DTensor":
                return NotImplemented  # its own dispatch calls operators on the parts
            if each.__name__ == _FAKE:
                return operator(*args, **kwargs)
        tensors = _tensors([*args, *kwargs.values()])
        output = self._run(operator, args, kwargs, tensors)
        if self._record is not None and type(output).__name__ != _FAKE:
            self._record(operator, args, tensors, output)
        return output

    def _run(self, operator: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        if operator in _FILLED and _is_known(args[0], kwargs) and not _in_backward():
            return _without_values(operator, args, {**kwargs, "device": "meta"}, _FILLED[operator](args))
        for tensor in tensors:
            if tensor.is_meta:
                return self._run_on_meta(operator, args, kwargs)
        return _run_on_cpu(operator, args, kwargs, tensors)

    def _run_on_meta(self, operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if operator._schema.name == _WRAPPED:
            return aten.alias.default(*args)
        if operator is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        if operator in _MASKED:
            args = _MASKED[operator](*args)
            operator = aten.index_put_.default if operator is aten.index_put_.default else aten.index.Tensor
        written = _written(operator, args) if operator._schema.is_mutable else None
        if written is not None and not written.is_meta:
            return written  # a real tensor keeps its values where those to be written are not known
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "meta"}
        output = _shaped(operator, args, kwargs)
        if operator in _ORDERING:
            at = _ORDERING[operator]
            dim = args[at] if len(args) > at else kwargs.get("dim", -1)
            return output[0], _positions(output[1], dim)
        if isinstance(output, Tensor):
            return self._with_values(output)
        return tree_map_only(Tensor, self._with_values, output)

    def _with_values(self, tensor: Tensor) -> Tensor:
        """Return an integer or boolean tensor as real zeros, unless it is large; another one as it is."""
        if tensor.is_floating_point() or not tensor.is_meta or tensor.is_complex() or tensor.numel() > self._largest:
            return tensor
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def _run_on_cpu(operator: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """Run an operator without meta tensors among its arguments: what it makes is real, unless it is a large float."""
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return _without_values(operator, args, kwargs)
    device = kwargs.get("device")
    to_meta = device is not None and torch.device(device).type == "meta"
    if to_meta and (not tensors or not tensors[0].is_floating_point()):
        if operator is aten.empty.memory_format or _in_backward():
            made = operator(*args, **kwargs)
            if made.is_floating_point() and (_in_backward() or made.numel() > _SMALL):
                return made  # a gradient, or memory for values that are not known
        kwargs = {**kwargs, "device": "cpu"}
    try:
        return operator(*args, **kwargs)
    except NotImplementedError:  # the CPU lacks it for integers, but the device of a forward may have it
        return _without_values(operator, args, kwargs)


# Operators that return values and their positions, and the number of the argument that is the dimension.
_ORDERING: dict[Any, int] = {aten.topk.default: 2, aten.sort.default: 1, aten.sort.stable: 2}


def _positions(like: Tensor, dim: int) -> Tensor:
    """Return 0, 1, 2, .. along `dim` in the shape of `like`, such as the experts that a router chooses."""
    counted = torch.arange(like.shape[dim], device="cpu") if like.dim() else torch.zeros((), dtype=torch.long)
    shape = [1] * like.dim()
    if shape:
        shape[dim] = -1
    return counted.view(shape).expand(like.shape).clone()


_Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
_known: dict[Any, _Form | tuple[_Form, ...] | None] = {}  # outputs of operators that make new tensors
_MOST_KNOWN = 1 << 15


def _shaped(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the operator's output on meta, cached for arguments of the same kind."""
    key = _key(operator, args, kwargs)
    try:
        forms = None if key is None else _known.get(key)
    except TypeError:  # an argument that cannot be part of a key
        key = forms = None
    if forms is not None:
        return _made(*forms) if isinstance(forms[0], torch.Size) else tuple(_made(*form) for form in forms)
    args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
    output = _SHAPES.get(operator, operator)(*args, **kwargs)
    if key is not None and _are_new(output, _tensors([*args, *kwargs.values()])):
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = _form(output) if isinstance(output, Tensor) else tuple(map(_form, output))
    return output


def _key(operator: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return the key of an operator's call in `_known`, or None for one whose output is not kept."""
    if operator.is_view or operator._schema.is_mutable:
        return None
    return operator, _kind_of(args, kwargs), torch.get_default_dtype()


def _are_new(output: Any, inputs: list[Tensor]) -> bool:
    """Return whether an output is one or several meta tensors, none of which shares memory with another or an input."""
    tensors = (output,) if isinstance(output, Tensor) else output
    if type(tensors) is not tuple or not all(type(tensor) is Tensor and tensor.is_meta for tensor in tensors):
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    return len(storages) == len(tensors) and storages.isdisjoint(t.untyped_storage()._cdata for t in inputs)


def _form(tensor: Tensor) -> _Form:
    return tensor.shape, tensor.stride(), tensor.dtype


def _made(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return aten.empty_strided.default(shape, stride, dtype=dtype, device="meta")


def _kind_of(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return what determines the form of an output: a tensor's own form, the type and value of anything else."""
    kind: list[Any] = [tuple(kwargs)]
    ahead = [*args, *kwargs.values()]
    while ahead:
        value = ahead.pop()
        if isinstance(value, Tensor):
            kind.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            kind.append(len(value))
            ahead += value
        else:
            kind.append((type(value), value))
    return tuple(kind)


def _in_backward() -> bool:
    """Return whether a gradient is being computed rather than a forward; gradients are on meta, also of zeros."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _tensors(values: list[Any]) -> list[Tensor]:
    """Return the tensors among arguments, also in lists, in their order."""
    found: list[Tensor] = []
    ahead = values[::-1]
    while ahead:
        value = ahead.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            ahead += reversed(value)
    return found


def _grouped_mm(x: Tensor, weight: Tensor, offs: Any = None, *_: Any, **__: Any) -> Tensor:
    """Compute `aten::_grouped_mm`, whose own meta kernel takes bfloat16 only."""
    if x.dim() == 2 and weight.dim() == 2:
        return x.new_empty(offs.shape[0], x.shape[0], weight.shape[1])
    return x.new_empty(*(x.shape[:-1] if x.dim() == 2 else x.shape[:2]), weight.shape[-1])


_SHAPES: dict[Any, Callable[..., Tensor]] = {
    getattr(aten, name).default: _grouped_mm for name in ("_grouped_mm",) if hasattr(aten, name)
}


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _without_values(operator: Any, args: Any, kwargs: dict[str, Any], value: float = _LARGEST) -> Any:
    """Return the output as a real tensor of the right shape, filled with `value`, or 0 for integers."""
    written = _written(operator, args)
    if written is not None:
        return written
    takes_device = any(argument.name == "device" for argument in operator._schema.arguments)
    args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
    shapes = operator(*args, **({**kwargs, "device": "meta"} if takes_device else kwargs))

    def filled(tensor: Tensor) -> Tensor:
        known = value if tensor.is_floating_point() else int(value)
        return torch.full(tensor.shape, known, dtype=tensor.dtype, device="cpu")

    return tree_map_only(Tensor, filled, shapes)


def _written(operator: Any, args: Any) -> Tensor | None:
    """Return the argument that an in-place operator writes to."""
    if operator._schema.is_mutable and args and isinstance(args[0], Tensor):
        first = operator._schema.arguments[0]
        if first.alias_info is not None and first.alias_info.is_write:
            return args[0]
    return None


def _indices(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Return indices with those of True in place of each boolean mask, so that the output's shape is known."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


# Operators with a real output, as for other tensors made from nothing: its value by their arguments.
_FILLED: dict[Any, Callable[[Any], float]] = {
    aten.new_zeros.default: lambda args: 0,
    aten.zeros_like.default: lambda args: 0,
    aten.new_ones.default: lambda args: 1,
    aten.ones_like.default: lambda args: 1,
    aten.new_full.default: lambda args: args[2],
    aten.full_like.default: lambda args: args[1],
}


def _is_known(like: Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether the values of what is filled in the shape of `like` are kept: not where results will join them."""
    receives = like.requires_grad and kwargs.get("dtype", like.dtype).is_floating_point
    return like.is_meta and like.numel() <= _SMALL and not receives


_MASKED: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: lambda x, indices: (x, _indices(indices)),
    aten.index_put_.default: lambda x, indices, *rest: (x, _indices(indices), *rest),
    aten.masked_select.default: lambda x, mask: (x, _indices([mask.expand(x.shape)])),
    aten.nonzero.default: lambda x: (
        torch.zeros(0, x.dim(), dtype=torch.long, device="cpu"),
        [torch.zeros(0, dtype=torch.long, device="cpu")],
    ),
}


class _CopyToMeta(TorchFunctionMode):
    """Deep copies of tensors become meta tensors; small integers keep their values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = _copied(tensor)
        return memo[id(tensor)]


def _copied(tensor: Tensor) -> Tensor:
    floating = tensor.is_floating_point() or tensor.is_complex()
    if not floating and not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter) and tensor.numel() <= _SMALL:
        return tensor.detach().cpu().clone()
    if tensor.is_meta and not floating and tensor.numel() <= _SMALL:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    copied = torch.empty(sharded.shape_of(tensor), dtype=tensor.dtype, device="meta")
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` on the meta device, with the same modules and configs, without adapters and hooks.

    Linear layers with a packed weight become plain ones. Changes of the copy do not affect the model.
    """
    memo: dict[int, Any] = {}  # {id of an object: its copy}
    sharded: dict[nn.Module, nn.Module] = {}  # modules of FSDP2's classes, which refuse to be copied, and their copies
    is_sharded: Callable[[Any], bool] = _is_sharded  # to mypy a class is not hashable
    for _, module in base_modules(model):
        _leave_out_adapters(module, memo)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:  # parameters define their own copying
                memo[id(tensor)] = _copied(tensor)
        cls = original_class(module)
        if is_sharded(cls):
            sharded[module] = memo[id(module)] = object.__new__(cls.__bases__[1])
            for name, value in module.__dict__.items():
                if isinstance(value, dict) and ("_hooks" in name or _COMPOSABLE in str(name)):
                    memo[id(value)] = type(value)()
    with _CopyToMeta():
        copied = copy.deepcopy(model, memo)
        for module, plain in sharded.items():
            plain.__dict__.update(copy.deepcopy(module.__dict__, memo))
    for module in copied.modules():
        _strip(module)
    return copied


def _leave_out_adapters(module: nn.Module, memo: dict[int, Any]) -> None:
    """Add to a deep copy's memo what peftcore put at a module: names of adapters stay, and nothing else."""
    for name in (CHILD, TRAINED):
        adapters = module._modules.get(name)
        if adapters is not None:
            memo[id(adapters._modules)] = dict.fromkeys(adapters._modules)
    for name in (_STATE, ROWS):
        value = module.__dict__.get(name)
        if not isinstance(value, (str, type(None))):
            memo[id(value)] = None


@cache
def _is_sharded(cls: type) -> bool:
    """Return whether it is a class of FSDP2."""
    return any(base.__name__ == "FSDPModule" for base in cls.__mro__)


def _strip(module: nn.Module) -> None:
    module.__class__ = original_class(module)
    module._modules.pop(CHILD, None)
    module._modules.pop(TRAINED, None)
    module.__dict__.pop("forward", None)  # accelerate's hooks, which move weights
    for name, value in list(module.__dict__.items()):
        if name.startswith("_peftcore_"):  # the record of the adapters, and what they need at their modules
            del module.__dict__[name]
        if (name.endswith("_hooks") or "_hooks_" in name) and isinstance(value, dict):
            value.clear()
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and tuple(getattr(weight, "shape", ())) != (
        module.out_features,
        module.in_features,
    ):
        floating = next((t.dtype for t in [weight, module.bias] if t is not None and t.is_floating_point()), None)
        plain = torch.empty(module.out_features, module.in_features, dtype=floating, device="meta")
        module.__class__ = nn.Linear
        module._parameters["weight"] = nn.Parameter(plain, requires_grad=False)
