"""Chain of an adapted module: its original forward, wrapped in one link per adapter (`peftcore.plugin.link`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from peftcore.engine.adaptation.class_swap import BUILT
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import OWN_FORWARD, original_class, original_forward
from peftcore.model.experts import (
    ExpertAdapters,
    PackedExpert,
    adapter_of_expert,
    expert_changes,
    expert_linear,
    experts_forward,
    has_interface_forward,
)
from peftcore.model.weight_formats import DENSE, ONE_EXPERT, quantized_format, weight_format
from peftcore.plugin.adapter import Change, LowRank
from peftcore.plugin.link import ChainLink, Link
from peftcore.plugin.method import WeightFormat

if TYPE_CHECKING:
    from peftcore.ops import PackedWeight

EXPERTS_ARGUMENTS = {"hidden_states", "top_k_index", "top_k_weights"}  # set by transformers' experts interface


class OwnForward(ChainLink):
    """The innermost link: the module's original forward."""

    __slots__ = ("_changes", "_forward", "_operands", "_weights")

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        weights: WeightFormat | None = None,
        changes: Sequence[Mapping[str, Change]] = (),
    ) -> None:
        self.module = module
        self._forward = forward
        self._weights = weights
        self._changes = changes
        self._operands = None if changes else _operands_of(module, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._changes:
            return self._forward(self.module, *args, **kwargs)
        if self._forward is own_forward:
            return self._within_hook(*args, **kwargs)
        return self._changed(self._forward, *args, **kwargs)

    def _changed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `forward` on changed parameters."""
        expert_changes_by_name = self._expert_changes(forward, kwargs)
        if expert_changes_by_name is not None:
            return experts_forward(self.module, *args, changes=expert_changes_by_name, around=with_changes, **kwargs)
        copy = _changed(self.module, self._changes, self._weights)
        output = forward(copy, *args, **kwargs)
        if not is_dynamo_compiling():
            keep_attributes(self.module, copy)
        return output

    def _within_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward on changed parameters in accelerate's hook, which moves input and weights to one device."""
        hook: Any = getattr(self.module, "_hf_hook", None)
        forward = getattr(getattr(self.module, "_old_forward", None), "__func__", None)
        if hook is None or forward is not original_forward(self.module):
            raise PeftcoreError(
                f"a {original_class(self.module).__name__} has its own `forward` on the instance, so an adapter "
                "cannot change the weights that it reads. Exclude the module: exclude_modules=[...]"
            )
        args, kwargs = hook.pre_forward(self.module, *args, **kwargs)
        with torch.no_grad() if getattr(hook, "no_grad", False) else nullcontext():
            output = self._changed(forward, *args, **kwargs)
        return hook.post_forward(self.module, output)

    def _expert_changes(
        self, forward: Any, arguments: Mapping[str, Any]
    ) -> dict[str, list[LowRank | ExpertAdapters]] | None:
        """Return the changes of the experts' weights, or None if the forward needs changed copies of all weights."""
        if not has_interface_forward(self.module, forward) or not arguments.keys() <= EXPERTS_ARGUMENTS:
            return None
        return expert_changes(self.module, self._changes)

    def on_weights(self, changes: Mapping[str, Change]) -> OwnForward:
        return OwnForward(self.module, self._forward, self._weights, (changes, *self._changes))

    def linear_operands(self, x: Tensor) -> tuple[Tensor | PackedWeight, Tensor | None] | None:
        if self._operands is nn.Linear:  # the ordinary case
            module = self.module
            weight: Any = module.weight
            if type(weight) not in _DENSE or weight.requires_grad:
                return None
            return weight, module.bias  # type: ignore[return-value]
        return None if self._operands is None else self._operands(self.module, x)

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        weights = self._weights or weight_format(self.module)
        if not self._changes:
            return weights.read(self.module), weights.read_bias(self.module)
        copy: Any = _changed(self.module, self._changes, weights)
        is_dense = weights.decode is not None and any("weight" in changes_by_name for changes_by_name in self._changes)
        return copy.weight if is_dense else weights.read(copy), weights.read_bias(copy)


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call this instance's forward while the module has its original class."""
    instance_forward = module.__dict__[OWN_FORWARD]
    if getattr(instance_forward, "__self__", None) is not module:
        return instance_forward(*args, **kwargs)
    view: nn.Module = object.__new__(original_class(module))
    object.__setattr__(view, "__dict__", module.__dict__)  # the same module with another class
    return instance_forward.__func__(view, *args, **kwargs)


class Branched(ChainLink):
    """`BranchedBase` of a combiner: the inner links, and each combined adapter as a branch directly around `own`."""

    __slots__ = ("_base", "_branches", "own")

    def __init__(self, base: Any, own: OwnForward, branches: Mapping[str, Link]) -> None:
        self.module = base.module
        self.own = own  # the module's own forward
        self._base = base
        self._branches = branches

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._base(*args, **kwargs)

    def branch(self, name: str) -> Link:
        """Return the link of the adapter `name` directly around the module's original forward."""
        if name not in self._branches:
            raise PeftcoreError(
                f"'{name}' is not a branch of this placement, which combines {', '.join(self._branches)}. Add it: "
                f"Around(path, adapter, branches=[..., '{name}'])"
            )
        return self._branches[name]

    @property
    def adapter(self) -> nn.Module | None:
        return cast("nn.Module | None", self._base.adapter)

    @property
    def inside(self) -> Any:
        return self._base.inside

    @property
    def is_own(self) -> bool:
        """Return whether no other adapter is inside, so that calling this calls `own`."""
        return self._base is self.own

    def on_weights(self, changes: Mapping[str, Change]) -> Branched:
        original, base = self.own.on_weights(changes), self._base.on_weights(changes)
        branches = {name: link.on_weights(changes) for name, link in self._branches.items()}
        return Branched(original if self.is_own else base, original, branches)

    def linear_operands(self, x: Tensor) -> Any:
        return self._base.linear_operands(x)

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = self._base.weight_and_bias()
        return result


def with_changes(layer: nn.Linear, changes: Sequence[Any], expert: int) -> Any:
    """Wrap the layer of one expert in links for `changes`, the first innermost."""
    link: Any = OwnForward(layer, type(layer).forward, ONE_EXPERT if isinstance(layer, PackedExpert) else DENSE)
    for change in changes:
        adapter = adapter_of_expert(change, expert)
        kind = change.link if isinstance(change, ExpertAdapters) else Link
        link = kind(type(adapter).__name__, adapter, link)
    return link


def expert_link(module: nn.Module, base: Any, name: str, expert: int) -> Any:
    """Return the `Base` for an adapter of one expert's layer: this layer with the inner adapters of `base`.

    Args:
        module: the module that holds the experts.
        base: its chain.
        name: name of the stacked weight.
        expert: index of the expert.
    """
    changes_inside: list[Mapping[str, Any]] = []
    while not isinstance(base, OwnForward):
        changes = base.changes_of(base.adapter)
        if not changes:
            raise PeftcoreError(
                f"an adapter changes the weights of experts inside another adapter, {type(base.adapter).__name__}, "
                "that wraps all experts of the module. Deactivate one of them: peftcore.activate(model, [...])"
            )
        changes_inside.insert(0, changes)
        base = base.inside
    changes_by_name = expert_changes(module, changes_inside)
    if changes_by_name is None:
        raise PeftcoreError(
            f"one adapter changes the stacked weights of {original_class(module).__name__}, and another one is "
            "placed on its single experts. Deactivate the first adapter: peftcore.activate(model, [...])"
        )
    return with_changes(expert_linear(module, name, expert), changes_by_name.get(name, ()), expert)


def _changed(
    module: nn.Module, changes: Sequence[Mapping[str, Change]], weights: WeightFormat | None = None
) -> nn.Module:
    """Return a shallow copy of `module` with changed parameters; other threads and graphs still read the original."""
    copy: nn.Module = object.__new__(type(module))
    parameters: dict[str, Any] = dict(module._parameters)  # a changed weight need not be a parameter
    modules: dict[str, Any] = dict(module._modules)
    copy.__dict__.update(module.__dict__, _parameters=parameters, _modules=modules)
    for name in dict.fromkeys(name for changes_by_name in changes for name in changes_by_name):
        stored_format = weights if name == "weight" and weights is not None else quantized_format(module, name)
        if stored_format is not None and stored_format.decode is not None:
            parameters[name] = stored_format.read(module)  # the module also accepts a dense weight
    for changes_by_name in changes:
        for name, change in changes_by_name.items():
            child, _, inner_name = name.partition(".")
            if not inner_name:
                parameters[name] = _applied(change, parameters[name], name)
            elif BUILT[0] in modules[child].__dict__:
                raise PeftcoreError(
                    f"one adapter changes '{name}' of a {original_class(module).__name__}, and its submodule "
                    f"'{child}' has adapters too. Place both adapters on the same module"
                )
            else:
                modules[child] = _changed(modules[child], [{inner_name: change}])
    return copy


def _applied(change: Change, parameter: Tensor, name: str) -> Tensor:
    changed = change(parameter)
    if changed.shape != parameter.shape:
        raise PeftcoreError(
            f"an adapter returned shape {list(changed.shape)} for the parameter '{name}' of shape "
            f"{list(parameter.shape)}. An adapter must preserve the parameter's shape"
        )
    return changed.to(parameter.dtype)


_OF_COPY = ("_parameters", "_modules")


def keep_attributes(module: nn.Module, copy: nn.Module) -> None:
    """Copy attributes that the forward has set on `copy`, such as a router's logits, to the module."""
    attributes = module.__dict__
    for name, value in copy.__dict__.items():
        if name not in _OF_COPY and (name not in attributes or attributes[name] is not value):
            attributes[name] = value


_DENSE = (Tensor, nn.Parameter)


def _operands_of(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return `linear_operands` of the class whose forward this is, or `nn.Linear`.

    A subclass that overrides the forward may compute something else, so it has none.
    """
    cls: Any
    for cls in original_class(module).__mro__:
        if cls.__dict__.get("forward") is forward:
            break
    else:
        return None
    if cls is nn.Linear:
        return nn.Linear
    if (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return _transposed_operands
    return vars(cls).get("linear_operands")


def _transposed_operands(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    weight = module.weight
    return None if type(weight) not in _DENSE or weight.requires_grad else (weight.T, module.bias)
