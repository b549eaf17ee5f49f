"""Swap the class of a module for a cached subclass whose `forward` runs adapters around the original forward.

    Linear                       Linear (adapted)
      forward(x)         =>        forward(x) = chain(x)
                                   peftcore: Adapters        the adapters, a child module
                                     default: ...
                                   chain: After(Around(... own forward))

No module is replaced or renamed: base keys of `state_dict()` stay the same, `isinstance` checks pass, and hooks and
tied weights survive. The chain is built when the set of active adapters changes, not in `forward`.
"""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import nn
from torch.compiler import is_dynamo_compiling

from peftcore.engine.adaptation.ancestors import LOCK, NAMES, adapter_for_each_sample, is_enclosing, takes_adapter_names
from peftcore.engine.adaptation.chain import Branched, OwnForward, expert_link, own_forward
from peftcore.engine.adaptation.class_swap import BUILT, one_for_each_class, restore_class, subclass
from peftcore.engine.adaptation.concurrency import ModelLock, disabled_in_thread
from peftcore.engine.adaptation.expert_parallel import ExpertsForward, followed_plan
from peftcore.engine.adaptation.per_sample import PerSample
from peftcore.engine.adaptation.recomputation import SOURCE, inputs_instead
from peftcore.engine.adaptation.tensor_parallel import Division, division_of
from peftcore.engine.adaptation.tensor_parallel_forward import DividedChain, WholeForward, has_on_parts, local_forward
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import (
    CHILD,
    OWN_FORWARD,
    ROWS,
    has_own_forward,
    original_forward,
    restoring_on_error,
)
from peftcore.model.experts import split_expert_path
from peftcore.model.weight_formats import find_weight_format
from peftcore.plugin.call import Frame
from peftcore.plugin.link import Link

_CHAIN, _BASE = BUILT  # the chain of the active adapters, and the chain without adapters
_ACTIVE = "_peftcore_active"  # names; None: the lock has an adapter for each sample


class Adapters(nn.Module):
    """The adapters of one module, by name. It is not a `ModuleDict`, which rejects names such as `keys`."""

    def __init__(self) -> None:
        super().__init__()
        self.links: dict[str, type[Link]] = {}  # {adapter: its link}, for adapters with a link other than `Link`
        self.branches: dict[str, tuple[str, ...]] = {}  # {combiner: names of the adapters that it combines}

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[name]  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self._modules)

    def forward(self, x: Any) -> Any:
        """Return `x`, since an `nn.Sequential` also calls this child."""
        return x


def attach(
    module: nn.Module,
    name: str,
    adapter: nn.Module,
    *,
    link: type[Link] = Link,
    branches: Sequence[str] = (),
    lock: ModelLock | None = None,
) -> None:
    """Attach an inactive adapter to `module`; the first adapter swaps the module's class.

    Args:
        module: the module.
        name: name of the adapter.
        adapter: the adapter.
        link: the link that runs the adapter in the module's chain.
        branches: names of other adapters of the module that this one combines.
        lock: the model's lock; None if the module is itself the model.
    """
    if not is_adapted(module):
        with restoring_on_error(module):
            if "forward" in module.__dict__:  # a forward of this instance, as accelerate's hooks set it
                module.__dict__[OWN_FORWARD] = module.__dict__.pop("forward")
            module.__class__ = _adapted_class(type(module))
            module.add_module(CHILD, Adapters().train(module.training))
            module.__dict__[LOCK] = lock or ModelLock()
            activate(module, ())
    adapters = cast(Adapters, module._modules[CHILD])
    adapters._modules[name] = adapter
    if link is not Link:
        adapters.links[name] = link
    if branches:
        adapters.branches[name] = tuple(branches)


def detach(module: nn.Module, name: str) -> None:
    """Detach the adapter `name` from `module`; detaching the last one restores the module."""
    if CHILD not in module._modules:
        return  # was already detached before an interruption
    adapters = adapters_at(module)
    if is_adapted(module):  # otherwise its class has changed since, or detaching was interrupted
        active = module.__dict__[_ACTIVE]
        if active is not None and name in active:
            activate(module, [other_name for other_name in active if other_name != name])
        if adapters._modules.keys() != {name}:
            adapters.links.pop(name, None)
            adapters.branches.pop(name, None)
            adapters._modules.pop(name, None)
            return
        restore_class(module, "_peftcore_original")
    if OWN_FORWARD in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop(OWN_FORWARD)
    for key in (_CHAIN, _BASE, _ACTIVE, ROWS):
        module.__dict__.pop(key, None)
    if not is_enclosing(module):
        module.__dict__.pop(LOCK, None)
    del module._modules[CHILD]  # last, so that an interrupted detach can find the module again


def activate(module: nn.Module, names: Sequence[str] | None, *, same_base: bool = False) -> None:
    """Rebuild the chain of an adapted module: its own forward inside, then the adapters `names` in order.

    Args:
        module: the adapted module.
        names: adapters from the innermost to the outermost; None for per-sample adapters, which are read from the
            model's lock at every call.
        same_base: the module is unchanged since its chain was last built.
    """
    base = module.__dict__[_BASE] if same_base else _base_of(module)
    module.__dict__[_ACTIVE] = None if names is None else tuple(names)
    module.__dict__[_BASE] = base
    module.__dict__[_CHAIN] = _chain_of(module, base)


def rebuild(module: nn.Module) -> None:
    """Rebuild the chain of an adapted module after its original forward has changed."""
    activate(module, module.__dict__[_ACTIVE])


def is_per_sample(module: nn.Module) -> bool:
    """Return whether this adapted module looks up an adapter for each sample."""
    return module.__dict__[_ACTIVE] is None


def activate_outermost(module: nn.Module, name: str) -> None:
    """Activate `name`, which is not a combiner, around the active adapters."""
    if OWN_FORWARD in module.__dict__ or module._forward_pre_hooks:  # the layer may be sharded
        activate(module, (*module.__dict__[_ACTIVE], name), same_base=True)
        return
    module.__dict__[_ACTIVE] = (*module.__dict__[_ACTIVE], name)
    module.__dict__[_CHAIN] = _link(cast(Adapters, module._modules[CHILD]), name, module.__dict__[_CHAIN])


def inside(module: nn.Module) -> Any:
    """Return the `Base` that a new adapter on `module` would get: the forward with all active adapters."""
    chain = module.__dict__[_CHAIN] if is_adapted(module) else _base_of(module)
    if isinstance(chain, DividedChain):
        return chain.chain
    division = division_of(module) if isinstance(chain, OwnForward) else None
    return chain if division is None else WholeForward(chain, division)


def inside_at(model: nn.Module, path: str) -> Any:
    """Return the `Base` at a path, which may name the layer of a single expert (`experts.3.down_proj`)."""
    expert_path = split_expert_path(model, path)
    if expert_path is None:
        return inside(model.get_submodule(path))
    module = model.get_submodule(expert_path[0])
    return expert_link(module, inside(module), *expert_path[1:])


def _base_of(module: nn.Module) -> OwnForward:
    forward = own_forward if OWN_FORWARD in module.__dict__ else original_forward(module)
    try:
        weights = find_weight_format(module)
    except PeftcoreError:  # a plugin's format fails; reading the weight raises the error again
        weights = None
    forward_link = OwnForward(module, forward, weights)
    plan = followed_plan(module) if OWN_FORWARD in module.__dict__ else None
    return forward_link if plan is None else ExpertsForward(forward_link, plan)


def _chain_of(module: nn.Module, base: OwnForward) -> Any:
    names = module.__dict__[_ACTIVE]
    if names is None:
        return _by_sample(module, base)
    if not names:
        return base
    adapters, division = adapters_at(module), division_of(module)
    innermost = base if division is None else WholeForward(base, division)
    chain: Any = innermost
    for name in names:
        is_combiner = name in adapters.branches
        chain = _around(adapters, name, base=chain, original=innermost) if is_combiner else _link(adapters, name, chain)
    return chain if division is None else DividedChain(division, chain, _parts(adapters, names, base, division))


def _parts(adapters: Adapters, names: Sequence[str], base: OwnForward, division: Division) -> Any:
    """Return the forward of the adapters on this rank's shard of a layer; None if one needs the full layer."""
    chain: Any = local_forward(base, division)
    for name in names:
        adapter: Any = adapters._modules[name]
        if name in adapters.links or name in adapters.branches or not has_on_parts(adapter):
            return None
        chain = partial(adapter.on_parts, chain, division)
    return chain


def _by_sample(module: nn.Module, base: OwnForward) -> Any:
    """Return the chain in which each sample of a batch has its own adapter."""
    adapters, division = adapters_at(module), division_of(module)
    innermost = base if division is None else WholeForward(base, division)
    chain = PerSample(
        innermost, adapters, partial(_around, adapters, base=innermost, original=innermost), module.__dict__[LOCK]
    )
    return chain if division is None else DividedChain(division, chain, None)


def _chain_of_call(module: Any, lock: ModelLock) -> Any:
    """Return the chain of the current call, which may choose an adapter for each sample (`choosing_by_sample`)."""
    if lock.choosing and lock.choice() is not None:
        return _by_sample(module, module._peftcore_base)
    return module._peftcore_chain


def _around(adapters: Adapters, name: str, *, base: Any, original: OwnForward) -> Link:
    """Return the link of the adapter `name` around `base`, with its branches if it combines any."""
    if name in adapters.branches:
        base = Branched(
            base, original, {branch: _link(adapters, branch, original) for branch in adapters.branches[name]}
        )
    return _link(adapters, name, base)


def _link(adapters: Adapters, name: str, base: Any) -> Link:
    adapter: Any = adapters._modules[name]
    return adapters.links.get(name, Link)(name, adapter, base)


def rebind(copy: nn.Module, *, builds: bool = True) -> None:
    """Make a shallow copy of a module independent: it runs a chain of its own if adapted, and else its class's forward.

    Args:
        copy: the copy.
        builds: build the chain of the copy. If False, the copy has no chain until `activate`.
    """
    copy.__dict__.pop("forward", None)
    copy.__dict__.pop(OWN_FORWARD, None)
    if not hasattr(type(copy), "_peftcore_original"):
        return
    if builds:
        activate(copy, copy.__dict__[_ACTIVE])
    else:
        for name in BUILT:
            copy.__dict__.pop(name, None)


def has_forward_of_instance(module: nn.Module) -> bool:
    """Return whether `module` has its own `forward` on the instance.

    accelerate's hooks and transformers' dispatch of tokens to experts on other ranks do not count, since they call the
    forward of the module's class.
    """
    return has_own_forward(module) and followed_plan(module) is None


def adapters_of(module: nn.Module) -> Adapters | None:
    """Return the adapters of a module, or None if it has none."""
    return adapters_at(module) if is_adapted(module) and CHILD in module._modules else None


def adapters_at(module: nn.Module) -> Adapters:
    """Return the adapters of a module that has at least one."""
    return module._modules[CHILD]  # type: ignore[return-value]


def adapter_at(module: nn.Module, name: str) -> nn.Module:
    """Return the adapter `name` of a module that has it."""
    return module._modules[CHILD]._modules[name]  # type: ignore[union-attr,return-value]


def changes_at(module: nn.Module, name: str) -> Mapping[str, Any]:
    """Return the changes of single parameters of the adapter `name` of a module, see `Link.changes_of`."""
    adapters = adapters_at(module)
    return adapters.links.get(name, Link).changes_of(adapters._modules[name])


def is_active(module: nn.Module) -> bool:
    """Return whether an adapter attached to `module` itself would be active in a call from this context."""
    names = module.__dict__.get(_ACTIVE, ())
    if not is_adapted(module):
        return False
    lock: ModelLock = module.__dict__[LOCK]
    choice = lock.choice() if lock.choosing else None
    if names is None or choice is not None:
        names = [name for name in (choice or lock.activation).distinct_adapters if name in adapters_at(module)]
    if not names:
        return False
    if is_dynamo_compiling():
        return not disabled_in_thread(lock)
    disabled = lock.calls.get(get_ident())
    return not (lock.is_disabled() if disabled is None else disabled)


def active_names(module: nn.Module) -> tuple[str, ...] | None:
    """Return the adapters of an adapted module that are active in each call, or None if that depends on the call."""
    names: tuple[str, ...] | None = module.__dict__[_ACTIVE]
    lock: ModelLock = module.__dict__[LOCK]
    has_no_combiners = names is not None and not any(adapters_at(module).branches.get(name) for name in names)
    return names if has_no_combiners and not lock.choosing and lock.context is None else None


def is_adapted(module: nn.Module) -> bool:
    """Return whether `module` has an adapter, active or not."""
    return hasattr(type(module), "_peftcore_original")  # `fully_shard` may have swapped the class once more


def is_outermost(module: nn.Module) -> bool:
    """Return whether the class of `module` is an adapted class, not a subclass of one (as under `fully_shard`)."""
    return "_peftcore_original" in type(module).__dict__


@one_for_each_class
def _adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            lock = self._peftcore_lock
        except AttributeError:  # torch.compile kept this bound method, and the adapters have been removed since
            return cls.forward(self, *args, **kwargs)
        if NAMES in kwargs and takes_adapter_names(self, kwargs):
            with adapter_for_each_sample(self, kwargs):
                return forward(self, *args, **kwargs)
        if is_dynamo_compiling():
            if lock.context is not None and not lock.context.inside():
                with Frame(self, lock.context, args, kwargs):
                    return forward(self, *args, **kwargs)
            return (self._peftcore_base if disabled_in_thread(lock) else _chain_of_call(self, lock))(*args, **kwargs)
        thread = get_ident()
        disabled = lock.calls.get(thread)
        if disabled is not None:
            if disabled:
                return self._peftcore_base(*args, **kwargs)
            chain = _chain_of_call(self, lock) if lock.choosing else self._peftcore_chain
            if args and hasattr(args[0], SOURCE):
                with inputs_instead(args[0]):
                    return chain(*args, **kwargs)
            return chain(*args, **kwargs)
        if lock.context is not None and not lock.context.inside():
            with Frame(self, lock.context, args, kwargs):
                return forward(self, *args, **kwargs)
        lock.enter(thread)
        try:
            if lock.calls[thread]:
                return self._peftcore_base(*args, **kwargs)
            return (_chain_of_call(self, lock) if lock.choosing else self._peftcore_chain)(*args, **kwargs)
        finally:
            lock.leave(thread)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super(adapted, self).__setstate__(state)
        activate(self, self.__dict__[_ACTIVE])

    def _replicate_for_data_parallel(self: Any) -> nn.Module:
        # `nn.DataParallel` calls a replica once, in a thread of its own.
        replica: nn.Module = super(adapted, self)._replicate_for_data_parallel()
        if self.__dict__[LOCK].is_disabled():
            replica.__dict__[_ACTIVE] = ()
        replica.__dict__[LOCK] = self.__dict__[LOCK].for_replica()
        # It gets its adapters after its creation.
        replica.__dict__[_CHAIN] = lambda *args, **kwargs: _chain_of(replica, _base_of(replica))(*args, **kwargs)
        return replica

    # transformers, accelerate and Trainer read the signature of `forward`.
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
