"""diffusers' own calls of pipelines for LoRA, by peftcore where PEFT is not installed.

    pipe.load_lora_weights("style", adapter_name="style")
    pipe.set_adapters(["style"], [0.5]); pipe.fuse_lora(); pipe.unload_lora_weights()

Importing this module patches the pipelines' mixins. Where PEFT is installed, it does nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import USE_PEFT_BACKEND
from safetensors.torch import save_file
from torch import nn

from peftcore import engine
from peftcore.engine.scaling import scale
from peftcore.errors import PeftcoreError
from peftcore.files.loading import load
from peftcore.integrations import adapter_methods
from peftcore.merging.merge import merge, unmerge

_FILE = "pytorch_lora_weights.safetensors"


def models(pipe: Any) -> dict[str, nn.Module]:
    """Return the models of `pipe` that can have LoRA, by name."""
    found = {name: getattr(pipe, name, None) for name in pipe._lora_loadable_modules}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def _adapted(pipe: Any, components: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Return the models of `pipe` with adapters; with `components`, those of these names."""
    there = models(pipe)
    unknown = [name for name in components or () if name not in pipe._lora_loadable_modules]
    if unknown:
        raise PeftcoreError(f"{type(pipe).__name__} has no component {unknown}. Its components: {', '.join(there)}")
    chosen = {name: there[name] for name in components or there if name in there}
    found = {name: model for name, model in chosen.items() if engine.state_of(model) is not None}
    if not found:
        raise PeftcoreError(f"no adapter is loaded in {', '.join(chosen)}. Load one: pipe.load_lora_weights(FOLDER)")
    return found


def load_lora_weights(pipe: Any, source: Any, adapter_name: str | None = None, **options: Any) -> None:
    """Load a file into the models that it has adapters for; there the adapter is the only active one, as with PEFT."""
    if options.pop("hotswap", False):
        raise PeftcoreError("load_lora_weights(hotswap=True) is not supported. Use peftcore.set_state_dict(model, ...)")
    number = max(map(len, get_list_adapters(pipe).values()), default=0)
    name = adapter_name or f"default_{number}"
    with tempfile.TemporaryDirectory() as folder:
        where, revision = source, None
        if isinstance(source, Mapping):
            where = Path(folder) / _FILE
            save_file({key: tensor.contiguous() for key, tensor in source.items()}, where)
        elif os.path.isdir(source):
            where = Path(source) / (options.get("subfolder") or "") / (options.get("weight_name") or "")
        elif not os.path.isfile(source):
            if options.get("weight_name"):
                raise PeftcoreError(
                    f"'{source}' is not a folder, and weight_name cannot be used to download from the hub. Download "
                    "the file with huggingface_hub.hf_hub_download and pass its path"
                )
            where, revision = adapter_methods.located(source, options)
        load(models(pipe), where, adapter=name, trainable=False, revision=revision)
    for model in models(pipe).values():
        state = engine.state_of(model)
        if state is not None and name in state.applied:
            engine.activate(model, name)


def set_adapters(pipe: Any, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
    """Activate these adapters in every model that has them, each with a factor; by default 1."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    weights = list(adapter_weights) if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
    if len(weights) != len(names):
        raise PeftcoreError(f"set_adapters got {len(names)} names and {len(weights)} weights. Pass a weight for each")
    having = _having(pipe, names)
    factors = {name: _factors(weight, list(models(pipe))) for name, weight in zip(names, weights, strict=True)}
    for component, (model, there) in having.items():
        adapter_methods.set_adapter(model, there)
        for name in there:
            scale(model, name, factors[name].get(component, 1.0))


def _having(pipe: Any, names: Sequence[str]) -> dict[str, tuple[nn.Module, list[str]]]:
    """Return {component: (its model, those of `names` that are its adapters)} of the models with adapters.

    Raises:
        PeftcoreError: no model has an adapter of one of the names.
    """
    adapted = _adapted(pipe)
    known = {name for model in adapted.values() for name in engine.require_state(model).names}
    if missing := [name for name in names if name not in known]:
        raise PeftcoreError(f"no adapter {missing} is loaded in {type(pipe).__name__} (loaded: {sorted(known)})")
    return {
        component: (model, [name for name in names if name in engine.require_state(model).names])
        for component, model in adapted.items()
    }


def _factors(weight: Any, components: Sequence[str]) -> dict[str, float]:
    """Return the factor of each component; a single number is for all."""
    given = weight if isinstance(weight, Mapping) else dict.fromkeys(components, weight)
    unknown = sorted(map(str, given.keys() - set(components)))
    if unknown:
        raise PeftcoreError(f"set_adapters got weights for {unknown}, but the components are {', '.join(components)}")
    wrong = {name: each for name, each in given.items() if not isinstance(each, (int, float, type(None)))}
    if wrong:
        raise PeftcoreError(f"set_adapters takes a number for each component, found {wrong}. Leave blocks out")
    return {name: 1.0 if each is None else float(each) for name, each in given.items()}


def fuse_lora(
    pipe: Any,
    components: Sequence[str] | None = None,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: Sequence[str] | None = None,
    **_options: Any,
) -> None:
    """Merge the active adapters; values that are not finite are always an error."""
    adapted = _adapted(pipe, components)
    if lora_scale != 1.0:
        raise PeftcoreError(
            f"fuse_lora(lora_scale={lora_scale}) is not supported. Set factors first: pipe.set_adapters(NAMES, WEIGHTS)"
        )
    active = {name for model in adapted.values() for name in engine.require_state(model).active}
    if adapter_names is not None and set(adapter_names) != active:
        raise PeftcoreError(
            f"fuse_lora merges the active adapters {sorted(active)}, found adapter_names={list(adapter_names)}. "
            "Activate those first: pipe.set_adapters(NAMES)"
        )
    for model in adapted.values():
        if engine.require_state(model).active:
            merge(model)


def unfuse_lora(pipe: Any, components: Sequence[str] | None = None, **_options: Any) -> None:
    """Restore the weights, bit for bit."""
    for model in _adapted(pipe, components).values():
        if engine.require_state(model).merged is not None:
            unmerge(model)


def unload_lora_weights(pipe: Any, *_args: Any, **_options: Any) -> None:
    """Remove all adapters; merged ones stay in the weights, as with PEFT."""
    for model in models(pipe).values():
        state = engine.state_of(model)
        if state is not None and state.merged is not None:
            unmerge(model)
            merge(model, keep_adapters=False)
        while (state := engine.state_of(model)) is not None:
            engine.remove(model, state.names[0])


def disable_lora(pipe: Any) -> None:
    """Compute with the base alone until `enable_lora`."""
    for model in _adapted(pipe).values():
        adapter_methods.disable_adapters(model)


def enable_lora(pipe: Any) -> None:
    """Activate the adapters that `disable_lora` deactivated."""
    for model in _adapted(pipe).values():
        adapter_methods.enable_adapters(model)


def delete_adapters(pipe: Any, adapter_names: str | Sequence[str]) -> None:
    """Remove these adapters from the models that have them."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for model, there in _having(pipe, names).values():
        adapter_methods.delete_adapter(model, there)


def get_active_adapters(pipe: Any) -> list[str]:
    """Return the names of the active adapters of all models."""
    states = filter(None, map(engine.state_of, models(pipe).values()))
    return list(dict.fromkeys(name for state in states for name in state.active))


def get_list_adapters(pipe: Any) -> dict[str, list[str]]:
    """Return {component: its adapters}."""
    states = {name: engine.state_of(model) for name, model in models(pipe).items()}
    return {name: state.names for name, state in states.items() if state is not None}


_METHODS: tuple[Callable[..., Any], ...] = (
    load_lora_weights,
    set_adapters,
    fuse_lora,
    unfuse_lora,
    unload_lora_weights,
    disable_lora,
    enable_lora,
    delete_adapters,
    get_active_adapters,
    get_list_adapters,
)


def _patch() -> None:
    import_module("diffusers.loaders.lora_pipeline")  # has the other mixins
    classes: list[Any] = [LoraBaseMixin]
    for cls in classes:
        classes += cls.__subclasses__()
        for method in _METHODS:
            if method.__name__ in vars(cls):
                setattr(cls, method.__name__, method)


if not USE_PEFT_BACKEND:
    _patch()
