"""Run forward passes without memory: floating-point tensors are on the meta device, integers are real.

Shapes, indices and masks determine the control flow; they are integers or booleans, and stay real CPU tensors. Weights
and activations are meta tensors. Values that depend on meta tensors are replaced by valid placeholders: integers are 0,
booleans False, Python floats 0.0, and a router selects the first experts. No random numbers are drawn.
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

_STATE = "_peftcore_state"  # attribute of the engine: the adapters applied to a model
_SMALL = 1 << 16  # integer tensors with more values are packed weights rather than indices
_COMPOSABLE = "__composable_api_state_key"  # attribute of PyTorch: the state of fully_shard, with its process groups
_LARGEST = 1 - 2**-24  # value of all random numbers, so that no layer is dropped at random
_FAKE = "FakeTensor"  # DTensor uses them to compute shapes, without memory
# The operator shares memory with its argument, but its meta kernel does not, so replace it by an alias.
_WRAPPED = "_c10d_functional::_wrap_tensor_autograd"
aten = torch.ops.aten

Record = Callable[[Any, tuple[Any, ...], list[Tensor], Any], None]


class MetaFloats(TorchDispatchMode):
    """Dispatch mode in which operators accept meta tensors together with real integer tensors; see above.

    Args:
        record: called after each operator with (operator, arguments, tensors among the arguments, output).
        largest_index: integer tensors with more values are also meta tensors.
    """

    def __init__(self, record: Record | None = None, largest_index: int = _SMALL) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self._record = record
        self._largest = largest_index

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for cls in types:
            if cls.__name__ == "DTensor":
                return (
                    NotImplemented  # DTensor redispatches the operator on local tensors, which reaches this mode again
                )
            if cls.__name__ == _FAKE:
                return operator(*args, **kwargs)
        tensors = _tensors([*args, *kwargs.values()])
        output = self._run(operator, args, kwargs, tensors)
        if self._record is not None and type(output).__name__ != _FAKE:
            self._record(operator, args, tensors, output)
        return output

    def _run(self, operator: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        if operator in _FILL_VALUES and _keeps_fill_value(args[0], kwargs) and not _in_backward():
            return _fill_output(operator, args, {**kwargs, "device": "meta"}, _FILL_VALUES[operator](args))
        for tensor in tensors:
            if tensor.is_meta:
                return self._run_on_meta(operator, args, kwargs)
        return _run_on_cpu(operator, args, kwargs, tensors)

    def _run_on_meta(self, operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if operator._schema.name == _WRAPPED:
            return aten.alias.default(*args)
        if operator is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        if operator in _EXPAND_MASKS:
            args = _EXPAND_MASKS[operator](*args)
            operator = aten.index_put_.default if operator is aten.index_put_.default else aten.index.Tensor
        destination = _destination(operator, args) if operator._schema.is_mutable else None
        if destination is not None and not destination.is_meta:
            return destination  # the values to write are unknown, so the real tensor keeps its values
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "meta"}
        output = _run_for_shapes(operator, args, kwargs)
        if operator in _ORDERING:
            dim_position = _ORDERING[operator]
            dim = args[dim_position] if len(args) > dim_position else kwargs.get("dim", -1)
            return output[0], _positions(output[1], dim)
        if isinstance(output, Tensor):
            return self._with_values(output)
        return tree_map_only(Tensor, self._with_values, output)

    def _with_values(self, tensor: Tensor) -> Tensor:
        """Replace a small integer or boolean meta tensor by real zeros; return any other tensor unchanged."""
        if tensor.is_floating_point() or not tensor.is_meta or tensor.is_complex() or tensor.numel() > self._largest:
            return tensor
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def _run_on_cpu(operator: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """Run an operator without meta arguments. Its output is real, unless it is a large float tensor."""
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return _fill_output(operator, args, kwargs)
    device = kwargs.get("device")
    to_meta = device is not None and torch.device(device).type == "meta"
    if to_meta and (not tensors or not tensors[0].is_floating_point()):
        if operator is aten.empty.memory_format or _in_backward():
            output = operator(*args, **kwargs)
            if output.is_floating_point() and (_in_backward() or output.numel() > _SMALL):
                return output  # a gradient, or uninitialized memory
        kwargs = {**kwargs, "device": "cpu"}
    try:
        return operator(*args, **kwargs)
    except NotImplementedError:  # not implemented for integers on the CPU; the model's device may support it
        return _fill_output(operator, args, kwargs)


# {operator that returns values and their indices: position of its argument `dim`}
_ORDERING: dict[Any, int] = {aten.topk.default: 2, aten.sort.default: 1, aten.sort.stable: 2}


def _positions(like: Tensor, dim: int) -> Tensor:
    """Return indices 0, 1, 2, .. along `dim` in the shape of `like`, so that a router selects the first experts."""
    positions = torch.arange(like.shape[dim], device="cpu") if like.dim() else torch.zeros((), dtype=torch.long)
    shape = [1] * like.dim()
    if shape:
        shape[dim] = -1
    return positions.view(shape).expand(like.shape).clone()


_Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
_SHAPE_CACHE: dict[Any, _Form | tuple[_Form, ...] | None] = {}  # shapes of operators that return new tensors
_CACHE_LIMIT = 1 << 15


def _run_for_shapes(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the operator's output on the meta device, cached by the shapes and dtypes of its arguments."""
    key = _key(operator, args, kwargs)
    try:
        forms = None if key is None else _SHAPE_CACHE.get(key)
    except TypeError:  # an argument is not hashable
        key = forms = None
    if forms is not None:
        return _empty(*forms) if isinstance(forms[0], torch.Size) else tuple(_empty(*form) for form in forms)
    args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
    output = _SHAPES.get(operator, operator)(*args, **kwargs)
    if key is not None and _is_fresh(output, _tensors([*args, *kwargs.values()])):
        if len(_SHAPE_CACHE) >= _CACHE_LIMIT:
            _SHAPE_CACHE.clear()
        _SHAPE_CACHE[key] = _form(output) if isinstance(output, Tensor) else tuple(map(_form, output))
    return output


def _key(operator: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return the key of an operator call in `_SHAPE_CACHE`; None if the output may share memory with an argument."""
    if operator.is_view or operator._schema.is_mutable:
        return None
    return operator, _kind_of(args, kwargs), torch.get_default_dtype()


def _is_fresh(output: Any, inputs: list[Tensor]) -> bool:
    """Return whether all outputs are meta tensors that share no memory with each other or with the inputs."""
    tensors = (output,) if isinstance(output, Tensor) else output
    if type(tensors) is not tuple or not all(type(tensor) is Tensor and tensor.is_meta for tensor in tensors):
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    return len(storages) == len(tensors) and storages.isdisjoint(t.untyped_storage()._cdata for t in inputs)


def _form(tensor: Tensor) -> _Form:
    return tensor.shape, tensor.stride(), tensor.dtype


def _empty(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return aten.empty_strided.default(shape, stride, dtype=dtype, device="meta")


def _kind_of(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return a key that determines the output's shape: metadata of tensors, type and value of all else."""
    kind: list[Any] = [tuple(kwargs)]
    stack = [*args, *kwargs.values()]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            kind.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            kind.append(len(value))
            stack += value
        else:
            kind.append((type(value), value))
    return tuple(kind)


def _in_backward() -> bool:
    """Return whether a backward pass is running, where all gradients are meta tensors, even zeros."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _tensors(values: list[Any]) -> list[Tensor]:
    """Return the tensors among the arguments, including tensors in nested lists, in order."""
    tensors: list[Tensor] = []
    stack = values[::-1]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            stack += reversed(value)
    return tensors


def _grouped_mm(x: Tensor, weight: Tensor, offs: Any = None, *_: Any, **__: Any) -> Tensor:
    """Return the output shape of `aten::_grouped_mm`, whose meta kernel only accepts bfloat16."""
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


def _fill_output(operator: Any, args: Any, kwargs: dict[str, Any], value: float = _LARGEST) -> Any:
    """Return the output as a real tensor of the right shape, filled with `value` (truncated for integers)."""
    destination = _destination(operator, args)
    if destination is not None:
        return destination
    takes_device = any(argument.name == "device" for argument in operator._schema.arguments)
    args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
    shapes = operator(*args, **({**kwargs, "device": "meta"} if takes_device else kwargs))

    def filled(tensor: Tensor) -> Tensor:
        fill_value = value if tensor.is_floating_point() else int(value)
        return torch.full(tensor.shape, fill_value, dtype=tensor.dtype, device="cpu")

    return tree_map_only(Tensor, filled, shapes)


def _destination(operator: Any, args: Any) -> Tensor | None:
    """Return the argument that an in-place operator writes to; None for any other operator."""
    if operator._schema.is_mutable and args and isinstance(args[0], Tensor):
        argument = operator._schema.arguments[0]
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[0]
    return None


def _expand_masks(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replace boolean masks by the indices of their True entries, so that the output's shape is known."""
    result: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            result += index.nonzero().unbind(1)
        else:
            result.append(index)
    return result


# {operator that fills a tensor in the shape of another: (arguments) -> fill value}. Their outputs are real.
_FILL_VALUES: dict[Any, Callable[[Any], float]] = {
    aten.new_zeros.default: lambda args: 0,
    aten.zeros_like.default: lambda args: 0,
    aten.new_ones.default: lambda args: 1,
    aten.ones_like.default: lambda args: 1,
    aten.new_full.default: lambda args: args[2],
    aten.full_like.default: lambda args: args[1],
}


def _keeps_fill_value(like: Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether a filled tensor of the shape of `like` is real: it must be small and not require gradients."""
    receives = like.requires_grad and kwargs.get("dtype", like.dtype).is_floating_point
    return like.is_meta and like.numel() <= _SMALL and not receives


_EXPAND_MASKS: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: lambda x, indices: (x, _expand_masks(indices)),
    aten.index_put_.default: lambda x, indices, *rest: (x, _expand_masks(indices), *rest),
    aten.masked_select.default: lambda x, mask: (x, _expand_masks([mask.expand(x.shape)])),
    aten.nonzero.default: lambda x: (
        torch.zeros(0, x.dim(), dtype=torch.long, device="cpu"),
        [torch.zeros(0, dtype=torch.long, device="cpu")],
    ),
}


class _CopyToMeta(TorchFunctionMode):
    """Dispatch mode in which deep copies of tensors are meta tensors, except for small integer tensors."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = _copy_tensor(tensor)
        return memo[id(tensor)]


def _copy_tensor(tensor: Tensor) -> Tensor:
    floating = tensor.is_floating_point() or tensor.is_complex()
    if not floating and not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter) and tensor.numel() <= _SMALL:
        return tensor.detach().cpu().clone()
    if tensor.is_meta and not floating and tensor.numel() <= _SMALL:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    empty = torch.empty(sharded.shape_of(tensor), dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy `model` to the meta device, with the same modules and configs, but without adapters and hooks.

    Linear layers with a packed weight become plain `nn.Linear`s. Changes to the copy do not affect the model.
    """
    memo: dict[int, Any] = {}  # {id of an object: its copy}
    # FSDP2's classes raise an error in deepcopy, so their copies are made by hand.
    sharded_copies: dict[nn.Module, nn.Module] = {}
    is_sharded: Callable[[Any], bool] = _is_sharded  # to mypy a class is not hashable
    for _, module in base_modules(model):
        _omit_adapters(module, memo)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:  # parameters define `__deepcopy__`
                memo[id(tensor)] = _copy_tensor(tensor)
        cls = original_class(module)
        if is_sharded(cls):
            sharded_copies[module] = memo[id(module)] = object.__new__(cls.__bases__[1])
            for name, value in module.__dict__.items():
                if isinstance(value, dict) and ("_hooks" in name or _COMPOSABLE in str(name)):
                    memo[id(value)] = type(value)()
    with _CopyToMeta():
        model_copy = copy.deepcopy(model, memo)
        for module, plain in sharded_copies.items():
            plain.__dict__.update(copy.deepcopy(module.__dict__, memo))
    for module in model_copy.modules():
        _strip(module)
    return model_copy


def _omit_adapters(module: nn.Module, memo: dict[int, Any]) -> None:
    """Prepare a deepcopy `memo` so that a module's adapters are copied only by name."""
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
    """Return whether `fully_shard` created the class."""
    return any(base.__name__ == "FSDPModule" for base in cls.__mro__)


def _strip(module: nn.Module) -> None:
    module.__class__ = original_class(module)
    module._modules.pop(CHILD, None)
    module._modules.pop(TRAINED, None)
    module.__dict__.pop("forward", None)  # accelerate's hook would move weights
    for name, value in list(module.__dict__.items()):
        if name.startswith("_peftcore_"):  # state of adapters
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
