"""Reference models for trainers: TRL's DPO, KTO, GRPO, RLOO and others compare a model with its initial state.

By themselves they would load the checkpoint a second time, without adapters and quantization. Instead they get the
model itself, through `ref_model=` if they have it, otherwise in place of what they would load: with adapters disabled
if these change nothing yet, otherwise with a frozen copy of their values (`reference.py`).

The constructor of every trainer class is patched. Options that would give wrong results with adapters are refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.adaptation.adapted import adapters_of
from peftcore.adaptation.class_swap import one_for_each_class
from peftcore.adaptation.modes import evaluation_mode
from peftcore.engine.state import STATE
from peftcore.errors import PeftcoreError
from peftcore.integrations.reference import Reference
from peftcore.integrations.trl_config import applying, is_of_peftcore

_PATCHED = "_peftcore_patched"  # on the constructor of a trainer class
_REFERENCE = "_peftcore_reference"  # on a trainer: its reference; on a view: the reference it shows
_GIVEN = "_peftcore_given"  # on a trainer: the models passed to its constructor
_LOADS = "create_model_from_path"  # TRL's functions that make a reference in trainers without `ref_model=`
_COPIES = "create_reference_model"
_MAKING = RLock()  # held while a trainer's module has other functions, which threads that overlap would not restore


def reference_of(trainer: Any) -> Reference | None:
    """Return the reference that `trainer` compares its model with, if it is the model itself."""
    return trainer.__dict__.get(_REFERENCE)


if TYPE_CHECKING:
    from transformers.trainer import Trainer  # whose import runs `peftcore.integrations.trainer`

    _Over = nn.Module  # `_View` is only mixed into subclasses of it
else:
    _Over = object


def view(reference: Reference, module: nn.Module) -> nn.Module:
    """Return a view of `module`, the reference's model or a part of it: same parameters, with the reference's outputs.

    It stays in evaluation mode, gives no gradients, and may be given its own forward.
    """
    shown: nn.Module = object.__new__(_view_class(type(module)))
    shown.__dict__ = {k: v for k, v in module.__dict__.items() if k != STATE}
    shown.__dict__ |= {name: dict(module.__dict__[name]) for name in ("_modules", "_parameters", "_buffers")}
    shown.__dict__[_REFERENCE] = reference
    return shown


class _View(_Over):
    """Mixin that `view` adds to the class of a module."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reference: Reference = self.__dict__[_REFERENCE]
        with torch.no_grad(), reference.activated(), evaluation_mode(self):
            return super().__call__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        reference: Reference = self.__dict__[_REFERENCE]
        if reference.is_acting:
            return value
        if isinstance(value, Tensor) and reference.holds(value):
            raise PeftcoreError(
                f"'{name}' of the reference is read outside its forward, where it has the value of the trained model"
            )
        return view(reference, value) if isinstance(value, nn.Module) else value

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return copies of the reference's values, including non-tensor state, for code that hashes them."""
        reference: Reference = self.__dict__[_REFERENCE]
        with torch.no_grad(), reference.activated():
            found = {name: t.detach().clone() for name, t in super().state_dict(*args, **kwargs).items()}
        applied = engine.require_state(reference.model).applied
        text = repr([(name, applied[name].method, applied[name].config) for name in reference.active])
        return {**found, _REFERENCE: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    def train(self, mode: bool = True) -> Any:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        return self


@one_for_each_class
def _view_class(cls: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, (_View, cls), names)


def patch_trainers(base: type[Trainer]) -> None:
    """Patch all classes that derive from `base`, transformers' `Trainer`, including those defined later."""

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)
        _patch(cls)

    base.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]
    classes = base.__subclasses__()
    for cls in classes:
        _patch(cls)
        classes += cls.__subclasses__()


def _patch(cls: type[Trainer]) -> None:
    own = cls.__dict__.get("__init__")
    if own is None or hasattr(own, _PATCHED):
        return
    signature = inspect.signature(own)
    rest = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(own)
    def init(trainer: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(trainer, *args, **kwargs)
        except TypeError:
            return own(trainer, *args, **kwargs)  # raises its own message
        given = {**bound.arguments, **bound.arguments.get(rest, {})}
        trainer.__dict__.setdefault(_GIVEN, []).extend(v for v in given.values() if isinstance(v, nn.Module))
        model = given.get("model")
        if is_of_peftcore(given.get("peft_config")) and not _has_adapters(model):
            _init_with_config(own, trainer, bound, given)
        elif isinstance(model, nn.Module) and _has_adapters(model):
            _refuse_settings(given)
            values = [(p, p.data) for p in model.parameters() if p.requires_grad]
            if "ref_model" in signature.parameters and given.get("ref_model") is None:
                bound.arguments["ref_model"] = _initial_model(trainer, model)
            with _MAKING, _loading_initial_model(own, trainer, lambda: model):
                own(*bound.args, **bound.kwargs)
            _restore(values)
        else:
            own(trainer, *args, **kwargs)
        if _has_adapters(trainer.__dict__.get("model")):
            _check(trainer)
        return None

    setattr(init, _PATCHED, True)
    cls.__init__ = init


def _init_with_config(own: Callable[..., None], trainer: Any, bound: inspect.BoundArguments, given: Any) -> None:
    """Call the constructor `own`, which applies `peft_config`, a config of peftcore, where it would apply PEFT's."""
    _refuse_settings({**given, "peft_config": None})
    values: list[tuple[nn.Parameter, Tensor]] = []
    made: list[nn.Module] = []
    reference = None
    if "ref_model" in bound.signature.parameters and given.get("ref_model") is None:
        reference = bound.arguments["ref_model"] = nn.Module()

    def applied(model: nn.Module) -> None:
        made.append(model)
        values.extend((p, p.data) for p in model.parameters() if p.requires_grad)
        if reference is not None:
            shown = _initial_model(trainer, model)
            reference.__class__, reference.__dict__ = shown.__class__, shown.__dict__

    with (
        _MAKING,
        applying(own, bound, applied),
        _loading_initial_model(own, trainer, lambda: made[0] if made else None),
    ):
        own(*bound.args, **bound.kwargs)
    _restore(values)
    if not _has_adapters(trainer.__dict__.get("model")):
        raise PeftcoreError(
            f"{type(trainer).__name__} did not apply peft_config, a {type(given['peft_config']).__name__} of peftcore. "
            "Apply it first: model=peftcore.apply(model, config), without peft_config"
        )


def _restore(values: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Undo a cast of trainable parameters, which TRL's constructors do on a 4-bit base. `values`: as they were."""
    for parameter, value in values:
        if parameter.dtype != value.dtype:
            parameter.data = value.to(parameter.device)


def _has_adapters(model: Any) -> bool:
    return isinstance(model, nn.Module) and engine.state_of(model) is not None


def _initial_model(trainer: Any, model: nn.Module) -> nn.Module:
    """Return a view of the trainer's reference, which is made by the first call."""
    reference = reference_of(trainer)
    if reference is None:
        reference = trainer.__dict__[_REFERENCE] = Reference(model)
    refuse_wrapped(trainer)
    return view(reference, model)


@contextmanager
def _loading_initial_model(
    own: Callable[..., None], trainer: Any, adapted: Callable[[], nn.Module | None]
) -> Iterator[None]:
    """Make the functions by which the constructor `own` loads or copies the adapted model return the initial model.

    They are replaced in the module of `own` within the block. `adapted` returns the adapted model, or None before it
    has been made.
    """
    names = inspect.unwrap(own).__globals__
    before = {name: names[name] for name in (_LOADS, _COPIES) if name in names}
    if "teacher_model" in inspect.signature(own).parameters:  # it may name the same checkpoint, without adapters
        before.pop(_LOADS, None)

    def load(path: str, *args: Any, **kwargs: Any) -> nn.Module:
        model = adapted()
        if model is not None and path == getattr(model.config, "_name_or_path", ""):
            return _initial_model(trainer, model)
        return before[_LOADS](path, *args, **kwargs)

    def copy(of: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        model = adapted()
        if model is not None and of is model:
            return _initial_model(trainer, model)
        return before[_COPIES](of, *args, **kwargs)

    names.update({name: ours for name, ours in ((_LOADS, load), (_COPIES, copy)) if name in before})
    try:
        yield
    finally:
        names.update(before)


def check_reference(trainer: Any, model: nn.Module) -> None:
    """Raise a PeftcoreError if `trainer` would shard its reference again, or bypass an adapter of `model`."""
    refuse_wrapped(trainer)
    refuse_bypassed(trainer, model)


def refuse_wrapped(trainer: Any) -> None:
    """Raise a PeftcoreError if a reference would be sharded again although it shares the model's weights."""
    wrapped = [name for name in ("fsdp", "deepspeed") if getattr(trainer, f"is_{name}_enabled", False)]
    if reference_of(trainer) is not None and wrapped:
        raise PeftcoreError(
            f"{type(trainer).__name__} would shard the reference separately ({wrapped[0]}), although it shares "
            "its weights with the model. Shard the model first with peftcore.shard(model, "
            "adapter_placement='replicate') "
            f"and start without {wrapped[0]}, or pass a separate model: ref_model=..."
        )


def _refuse_settings(given: dict[str, Any]) -> None:
    if given.get("peft_config") is not None:
        raise PeftcoreError(
            "peft_config=... would wrap a model that already has adapters. Leave it out to train these, or pass "
            "a model without adapters: peftcore.remove(model)"
        )
    args = given.get("args")
    if getattr(args, "sync_ref_model", False):
        raise PeftcoreError(
            "sync_ref_model=True moves the weights of the reference towards the model, but with adapters both "
            "share one base. Set sync_ref_model=False; to move the reference, start a new run from the saved adapter"
        )
    if getattr(args, "use_vllm", hasattr(args, "vllm_server_base_url")):
        raise PeftcoreError(
            "vLLM would get the base's weights without the adapters and generate with those. Set use_vllm=False "
            "to generate with the model itself; trainers that always use vLLM cannot be used with adapters"
        )


def _check(trainer: Any) -> None:
    given: list[nn.Module] = trainer.__dict__.get(_GIVEN, [])
    for model in (trainer.model, *given):
        if _has_adapters(model):
            refuse_bypassed(trainer, model)
    refuse_averages(trainer)
    for name, value in vars(trainer).items():
        teacher = name.startswith("teacher")  # it may be named by its path, without adapters
        if not teacher and _is_second_base(value, trainer.model) and not any(value is other for other in given):
            raise PeftcoreError(
                f"{type(trainer).__name__} loaded '{trainer.model.config._name_or_path}' again (trainer.{name}), "
                "without the model's adapters and quantization. Pass it the model to compare with"
            )


def refuse_averages(trainer: Any) -> None:
    """Raise a PeftcoreError if a callback would average the weights of a model with adapters."""
    for callback in trainer.callback_handler.callbacks:
        names = {cls.__name__ for cls in type(callback).__mro__}
        if "SyncRefModelCallback" in names or getattr(callback, "update_ref_model", False):
            raise PeftcoreError(
                f"{type(callback).__name__} writes averages into the weights of a reference or teacher, which "
                "shares them with the model. Leave the callback out, or disable it in the arguments"
            )
        if "BEMACallback" in names:
            raise PeftcoreError(
                f"{type(callback).__name__} averages into a second model of the same config, which has no adapters. "
                "Leave the callback out, and average a copy: torch.optim.swa_utils.AveragedModel(model)"
            )


def refuse_bypassed(trainer: Any, model: nn.Module) -> None:
    """Raise a PeftcoreError if TRL or Liger read the weight of an adapted head, bypassing the adapter."""
    forward = getattr(model.__dict__.get("forward"), "__func__", None)
    fused = forward is not None and "fused_lm_head" in inspect.signature(forward, follow_wrapped=False).parameters
    if not fused and not getattr(trainer.args, "use_liger_kernel", False):
        return
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module, what, leave_out in ((head, "output head", "exclude_modules=['lm_head']"), (model, "whole model", "")):
        if isinstance(module, nn.Module) and adapters_of(module) is not None:
            raise PeftcoreError(
                f"{type(trainer).__name__} reads the head's weight without calling the {what}, so its adapter "
                f"would neither be used nor trained. Do not adapt it{': ' + leave_out if leave_out else ''}"
            )


def _is_second_base(value: Any, model: nn.Module) -> bool:
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return (
        isinstance(value, nn.Module)
        and not isinstance(value, _View)
        and not _has_adapters(value)
        and type(value).__name__ == type(model).__name__
        and bool(path)
        and getattr(getattr(value, "config", None), "_name_or_path", None) == path
    )
