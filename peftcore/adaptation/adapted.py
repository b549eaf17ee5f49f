"""The one mechanism: a module's class is swapped for a cached subclass whose `forward` runs adapters around its own.

    Linear                       Linear (adapted)
      forward(x)         =>        forward(x) = chain(x)
                                   peftcore: Adapters        the adapters, a child module
                                     default: ...
                                   chain: After(Around(... own forward))

No module is replaced or renamed: base keys of `state_dict()` stay, `isinstance` holds, hooks and tied
weights survive. The chain is built when the set of active adapters changes, not in `forward`.
"""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from peftcore.adaptation.class_swap import BUILT, one_for_each_class, subclass, take_off
from peftcore.adaptation.concurrency import ModelLock, rests_in_thread
from peftcore.adaptation.enclosing import LOCK, is_enclosing
from peftcore.adaptation.outputs import first_of, with_first
from peftcore.adaptation.per_sample import PerSample
from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    from peftcore.ops import PackedWeight

Change = Callable[[Tensor], Tensor]  # a parameter -> what is read in its place

CHILD = "peftcore"  # the child module of an adapted module that holds its adapters
TRAINED = "peftcore_trained"  # the child of the model that keeps the values of `Train` placements
_CHAIN, _BASE = BUILT  # the chain, and that of no adapter for where they rest
_ACTIVE = "_peftcore_active"
_SAMPLES = "_peftcore_samples"
_OWN_FORWARD = "_peftcore_own_forward"
_WRAPPED = "_checkpoint_wrapped_module"  # the one child of PyTorch's wrapper for activation checkpointing


class Adapters(nn.Module):
    """The adapters of one module by name. Not a `ModuleDict`, which refuses names such as `keys`."""

    def __init__(self) -> None:
        super().__init__()
        self.behind: set[str] = set()  # names of the adapters that stand behind the module, not around it

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> nn.Module:
        return cast(nn.Module, self._modules[name])

    def __len__(self) -> int:
        return len(self._modules)

    def forward(self, x: Any) -> Any:
        """x: an `nn.Sequential` calls all its children in turn, this one too."""
        return x


class Base:
    """The module's own forward, as the innermost adapter sees it."""

    __slots__ = ("_changes", "_forward", "_operands", "module")

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], changes: Sequence[Mapping[str, Change]] = ()
    ) -> None:
        self.module = module
        self._forward = forward
        self._changes = changes
        self._operands = None if changes else _operands_of(module, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._changes:
            return self._forward(self.module, *args, **kwargs)
        if self._forward is _own_forward:
            raise PeftcoreError(
                f"{original_class(self.module).__name__} has a forward of this one instance, such as accelerate sets "
                "where it spreads a model over devices: what that reads of the weights cannot be changed. Keep the "
                "module on one device, or exclude it: exclude_modules=[...]"
            )
        return self._forward(_changed(self.module, self._changes), *args, **kwargs)

    def on_weights(self, changes: Mapping[str, Change]) -> Base:
        """The same forward, which reads changed parameters: by name (`weight`, `out_proj.weight`), what becomes of it.

        For modules that read weights past the layers that hold them, and layers that do more than their product.
        """
        return Base(self.module, self._forward, (changes, *self._changes))

    def linear_operands(self, x: Tensor) -> tuple[Tensor | PackedWeight, Tensor | None] | None:
        """(weight `[out, in]`, bias) where calling this with x is x Wᵀ + b and no more, W frozen; else None."""
        return None if self._operands is None else self._operands(self.module, x)


def _changed(module: nn.Module, changes: Sequence[Mapping[str, Change]]) -> nn.Module:
    """A shallow copy of `module` that holds changed parameters; threads and graphs of before see those of before."""
    copy: nn.Module = object.__new__(type(module))
    parameters: dict[str, Any] = dict(module._parameters)  # what a change gives need be no parameter
    modules: dict[str, Any] = dict(module._modules)
    copy.__dict__.update(module.__dict__, _parameters=parameters, _modules=modules)
    for each in changes:
        for name, change in each.items():
            child, _, rest = name.partition(".")
            if rest:
                modules[child] = _changed(modules[child], [{rest: change}])
            else:
                parameters[name] = change(parameters[name])
    return copy


def _operands_of(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """`linear_operands` of the class whose forward this is: a subclass that overrides it computes something else."""
    cls = next((c for c in original_class(module).__mro__ if c.__dict__.get("forward") is forward), None)
    if cls is nn.Linear:
        return _dense_operands
    if cls is not None and (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return lambda module, x: _dense_operands(module, x, transposed=True)
    return vars(cls).get("linear_operands") if cls is not None else None


def _dense_operands(module: Any, x: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor | None] | None:
    weight = module.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.requires_grad:
        return None
    return weight.T if transposed else weight, module.bias


class _AroundLink:
    __slots__ = ("_adapter", "_base", "module")

    def __init__(self, adapter: nn.Module, base: Any) -> None:
        self.module = base.module
        self._adapter = adapter
        self._base = base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._adapter(self._base, *args, **kwargs)

    def on_weights(self, changes: Mapping[str, Change]) -> _AroundLink:
        return type(self)(self._adapter, self._base.on_weights(changes))

    def linear_operands(self, x: Tensor) -> None:
        """None: an adapter stands between."""


class _AfterLink(_AroundLink):
    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._base(*args, **kwargs)
        return with_first(output, self._adapter(first_of(output)))


def attach(
    module: nn.Module, name: str, adapter: nn.Module, *, behind: bool = False, lock: ModelLock | None = None
) -> None:
    """Give `module` the adapter `name`, inactive; the module's class is swapped at the first one.

    Args:
        lock: that of the model; None: the module is a model of its own.
    """
    if not is_adapted(module):
        if "forward" in module.__dict__:  # an instance's own forward, as accelerate's hooks set it
            module.__dict__[_OWN_FORWARD] = module.__dict__.pop("forward")
        module.__class__ = _adapted_class(type(module))
        module.add_module(CHILD, Adapters().train(module.training))
        module.__dict__[LOCK] = lock or ModelLock()
        activate(module, ())
    adapters = adapters_at(module)
    adapters._modules[name] = adapter
    if behind:
        adapters.behind.add(name)


def detach(module: nn.Module, name: str) -> None:
    """Take the adapter `name` off `module`; with the last one the module is what it was."""
    adapters = adapters_at(module)
    if not is_adapted(module):  # it was given another class meanwhile
        del module._modules[CHILD]
        for key in (LOCK, _CHAIN, _BASE, _ACTIVE, _SAMPLES):
            del module.__dict__[key]
        return
    active = tuple(active for active in module.__dict__[_ACTIVE] if active != name)
    activate(module, active, module.__dict__[_SAMPLES])
    del adapters._modules[name]
    adapters.behind.discard(name)
    if not len(adapters):
        del module._modules[CHILD]
        for key in (_CHAIN, _BASE, _ACTIVE, _SAMPLES):
            del module.__dict__[key]
        take_off(module, "_peftcore_original")
        if not is_enclosing(module):
            del module.__dict__[LOCK]
        if _OWN_FORWARD in module.__dict__:
            module.__dict__["forward"] = module.__dict__.pop(_OWN_FORWARD)


def activate(module: nn.Module, names: Sequence[str], samples: Sequence[str | None] | None = None) -> None:
    """Rebuild the chain of an adapted module: its own forward inside, then the adapters `names` in order.

    With `samples`, a name or None for each sample of a batch, they do not follow each other: each has its samples.
    """
    base = _base_of(module)
    module.__dict__[_ACTIVE] = tuple(names)
    module.__dict__[_SAMPLES] = samples
    module.__dict__[_BASE] = base
    module.__dict__[_CHAIN] = _chain_of(module, base)


def _base_of(module: nn.Module) -> Base:
    return Base(module, _own_forward if _OWN_FORWARD in module.__dict__ else original_forward(module))


def _chain_of(module: nn.Module, base: Base) -> Any:
    adapters = adapters_at(module)
    names, samples = module.__dict__[_ACTIVE], module.__dict__[_SAMPLES]
    chain: Any = base
    links = {}
    for name in names:
        link = _AfterLink if name in adapters.behind else _AroundLink
        chain = link(adapters[name], base if samples is not None else chain)
        links[name] = adapters[name], chain
    if samples is not None and names:
        chain = PerSample(base, links, samples, behind=all(name in adapters.behind for name in names))
    return chain


def rebind(copy: nn.Module) -> None:
    """Let a shallow copy of an adapted module run its own chain, and any module the forward of its class."""
    copy.__dict__.pop("forward", None)
    copy.__dict__.pop(_OWN_FORWARD, None)
    if is_adapted(copy):
        activate(copy, copy.__dict__[_ACTIVE], copy.__dict__[_SAMPLES])


def has_forward_of_instance(module: nn.Module) -> bool:
    """Has `module` a forward of its own, other than that of accelerate's hooks around its class's?"""
    own = module.__dict__.get(_OWN_FORWARD, module.__dict__.get("forward"))
    inside = getattr(module, "_old_forward", None) if hasattr(module, "_hf_hook") else own
    return own is not None and getattr(inside, "__func__", None) is not original_forward(module)


def adapters_of(module: nn.Module) -> Adapters | None:
    """The adapters of a module, or None where it has none."""
    return adapters_at(module) if is_adapted(module) and CHILD in module._modules else None


def adapters_at(module: nn.Module) -> Adapters:
    """The adapters of a module that has some."""
    return cast(Adapters, module._modules[CHILD])


def acts(module: nn.Module) -> bool:
    """Would an adapter of `module` itself act in a call that this context makes?"""
    if not module.__dict__.get(_ACTIVE):
        return False
    lock = module.__dict__[LOCK]
    if is_dynamo_compiling():
        return not rests_in_thread(lock)
    rests = lock.calls.get(get_ident())
    return not (lock.rests() if rests is None else rests)


def is_adapted(module: nn.Module) -> bool:
    """Has `module` an adapter, active or not?"""
    return hasattr(type(module), "_peftcore_original")  # `fully_shard` may have swapped the class once more


def is_outermost(module: nn.Module) -> bool:
    """Is the class that adapters gave to `module` still its own, not the base of another one (`fully_shard`'s)?"""
    return "_peftcore_original" in type(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` without adapters."""
    cls = getattr(type(module), "_peftcore_original", type(module))
    return getattr(cls, "_peftcore_enclosed", cls)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The unbound forward of `module` without adapters."""
    return original_class(module).forward


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the model itself, without what peftcore put there; a shared module once."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None and name not in (CHILD, TRAINED):
                yield from walk(child, path if name == _WRAPPED else f"{path}.{name}" if path else name)

    yield from walk(model, prefix)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the model itself, adapters left out; a tied parameter under each of its names."""
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{path}.{name}" if path else name), parameter


def _own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module.__dict__[_OWN_FORWARD](*args, **kwargs)


@one_for_each_class
def _adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        lock = self._peftcore_lock
        if is_dynamo_compiling():
            return (self._peftcore_base if rests_in_thread(lock) else self._peftcore_chain)(*args, **kwargs)
        thread = get_ident()
        rests = lock.calls.get(thread)
        if rests is not None:
            return (self._peftcore_base if rests else self._peftcore_chain)(*args, **kwargs)
        lock.enter(thread)
        try:
            return (self._peftcore_base if lock.calls[thread] else self._peftcore_chain)(*args, **kwargs)
        finally:
            lock.leave(thread)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super(adapted, self).__setstate__(state)
        activate(self, self.__dict__[_ACTIVE], self.__dict__.get(_SAMPLES))

    def _replicate_for_data_parallel(self: Any) -> nn.Module:
        # Of `nn.DataParallel`: a replica is called in a thread of its own, and once.
        replica: nn.Module = super(adapted, self)._replicate_for_data_parallel()
        if self.__dict__[LOCK].rests():
            replica.__dict__[_ACTIVE] = ()
        replica.__dict__[LOCK] = ModelLock()
        replica.__dict__[_CHAIN] = _Replica(replica)
        return replica

    # transformers, accelerate and the Trainer read a forward's signature.
    forward.__wrapped__ = cls.forward  # type: ignore[attr-defined]  # as functools.wraps sets it
    forward.__doc__ = cls.forward.__doc__
    adapted: Any = subclass(
        cls,
        _adapted_class,
        {
            "forward": forward,
            "__setstate__": __setstate__,
            "_replicate_for_data_parallel": _replicate_for_data_parallel,
            "_peftcore_original": cls,
        },
    )
    return adapted


class _Replica:
    """The chain of a replica, whose adapters are put into it after it is made."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _chain_of(self.module, _base_of(self.module))(*args, **kwargs)
