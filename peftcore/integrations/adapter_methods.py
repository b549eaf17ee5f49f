"""transformers' own calls for adapters: by peftcore where PEFT is not installed, or the model has adapters of peftcore.

    model = AutoModelForCausalLM.from_pretrained("ADAPTER")    # its base, then the adapter
    pipeline("text-generation", model="ADAPTER")
    model.load_adapter("ADAPTER", "second"); model.set_adapter("second"); model.disable_adapters()

Where PEFT is installed, models without adapters of peftcore use PEFT. Importing this module patches `PeftAdapterMixin`;
`find_adapters` lets a module that loads models find adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import CONFIG_NAME
from transformers.utils.import_utils import is_peft_available

from peftcore import engine
from peftcore.composing.adapter_state import set_state_dict, state_dict as tensors_of
from peftcore.errors import PeftcoreError, warn
from peftcore.files.loading import load
from peftcore.files.safe_reading import CONFIG, TENSORS
from peftcore.integrations.trl_config import is_of_peftcore

_DISABLED = "_peftcore_disabled"  # on a model: the names that `enable_adapters` activates again
_PREFIX = "base_model.model."  # of names in files, which transformers leaves out


def load_adapter(
    model: nn.Module,
    peft_model_id: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: Mapping[str, Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
    is_trainable: bool = False,
    hotswap: bool | str = "auto",
    *,
    adapter_kwargs: Mapping[str, Any] | None = None,
    load_config: Any = None,
    **options: Any,
) -> Any:
    """Load an adapter from a folder, the hub, or memory (`peft_config` and `adapter_state_dict`).

    As with PEFT, the adapter is the only active one, and frozen unless `is_trainable`. With `hotswap=True` an adapter
    of this name gets the values, without a new compilation.
    """
    state, name = engine.state_of(model), adapter_name or "default"
    if hotswap == "auto":
        hotswap = bool(getattr(model, "_hotswap_enabled", False)) and state is not None and name in state.applied
    source = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    with tempfile.TemporaryDirectory() as memory:
        revision = None
        if peft_config is not None or adapter_state_dict is not None:
            _write(Path(memory), peft_config, adapter_state_dict)
            source = memory
        elif source is None:
            raise PeftcoreError("load_adapter needs a folder, an id of the hub, or peft_config and adapter_state_dict")
        else:
            source, revision = located(source, {**options, **(adapter_kwargs or {})})
        if hotswap:
            set_state_dict(model, name, source)
        else:
            disabled = state is not None and _are_disabled(model)
            load(model, source, adapter=name, trainable=is_trainable, revision=revision)
            engine.activate(model, [] if disabled else name)
            if disabled:
                model.__dict__[_DISABLED] = [name]
    if not is_trainable:
        model.eval()
    return _nothing_missing()


def located(source: str | os.PathLike[str], options: Mapping[str, Any]) -> tuple[str | os.PathLike[str], str | None]:
    """Return the folder or hub id, and the revision on the hub."""
    if os.path.isdir(source):
        return (Path(source) / options["subfolder"] if options.get("subfolder") else source), None
    wrong = [name for name in ("cache_dir", "force_download", "proxies", "subfolder", "token") if options.get(name)]
    if wrong:
        raise PeftcoreError(
            f"adapter '{source}' is not a folder, and {', '.join(wrong)} cannot be used to download it. Download it "
            "with huggingface_hub.snapshot_download and pass the folder, or log in with `hf auth login`"
        )
    return source, options.get("revision")


def _write(folder: Path, config: Any, tensors: Mapping[str, Tensor] | None) -> None:
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping) or tensors is None:
        raise PeftcoreError(
            "load_adapter from memory needs both peft_config, a dictionary of the fields of adapter_config.json, and "
            f"adapter_state_dict, found {type(config).__name__} and {type(tensors).__name__}"
        )
    (folder / CONFIG).write_text(json.dumps(fields, default=sorted))
    named = {n if n.startswith(_PREFIX) else _PREFIX + n: t.detach().contiguous() for n, t in tensors.items()}
    save_file(named, folder / TENSORS)


def _nothing_missing() -> Any:
    """Return transformers' report of a load without errors; a wrong file has raised one."""
    kind: Any = import_module("transformers.utils.loading_report").LoadStateDictInfo
    empty = {"list": list, "dict": dict}
    return kind(**{f.name: empty.get(str(f.type).partition("[")[0], set)() for f in dataclasses.fields(kind)})


def add_adapter(model: nn.Module, adapter_config: Any, adapter_name: str | None = None) -> None:
    """Apply a config and activate the new adapter alone."""
    name = adapter_name or "default"
    engine.apply(model, adapter_config, adapter=name)
    set_adapter(model, name)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Activate these adapters, and no others; if adapters are disabled, once they are enabled again."""
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    if _are_disabled(model):
        _refuse_unknown(model, names)
        model.__dict__[_DISABLED] = names
    else:
        engine.activate(model, names)


def _refuse_unknown(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        if name not in engine.require_state(model).names:
            engine.applied(model, name)  # raises an error


def _are_disabled(model: nn.Module) -> bool:
    return _DISABLED in model.__dict__ and not engine.require_state(model).active


def disable_adapters(model: nn.Module) -> None:
    """Compute with the base alone until `enable_adapters`.

    Raises:
        PeftcoreError: each sample of a batch has its own adapter.
    """
    state = engine.require_state(model)
    engine.refuse_per_sample(state, "disable adapters")
    active = list(state.active)
    if active:
        engine.activate(model, [])
        model.__dict__[_DISABLED] = active


def enable_adapters(model: nn.Module) -> None:
    """Activate the adapters that `disable_adapters` deactivated, unless others are active by now."""
    state, names = engine.require_state(model), model.__dict__.pop(_DISABLED, [])
    if not state.active:
        engine.activate(model, [name for name in names if name in state.names])


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the active adapters; if they are disabled, of those that will be enabled again."""
    state = engine.require_state(model)
    if _are_disabled(model):
        return [name for name in model.__dict__[_DISABLED] if name in state.names]  # others have been deleted
    return list(state.active)


def get_adapter_state_dict(
    model: nn.Module, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of an adapter, by default of the first active one, by transformers' names."""
    if state_dict is not None:
        raise PeftcoreError("get_adapter_state_dict reads the model. Leave state_dict out")
    active = active_adapters(model)
    if adapter_name is None and not active:
        raise PeftcoreError(f"no adapter is active. Name one of {engine.require_state(model).names}")
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors_of(model, adapter_name or active[0]).items()}


def delete_adapter(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Remove adapters. If no adapter is active then, the first that is left becomes active, with a warning."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    _refuse_unknown(model, names)
    was_active = bool(engine.require_state(model).active)
    for name in names:
        engine.remove(model, name)
    state = engine.state_of(model)
    if state is None:
        model.__dict__.pop(_DISABLED, None)
    elif was_active and not state.active and state.applied:
        left = next(iter(state.applied))
        warn(f"the active adapter was deleted; '{left}' is active now")
        engine.activate(model, left)


def _patch(name: str, ours: Callable[..., Any]) -> None:
    own = getattr(PeftAdapterMixin, name)

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("adapter_config", args[0] if args else None) if ours is add_adapter else None
        if engine.state_of(self) is not None or not is_peft_available() or is_of_peftcore(config):
            return ours(self, *args, **kwargs)
        return own(self, *args, **kwargs)

    setattr(PeftAdapterMixin, name, method)


def find_adapters(module: str) -> None:
    """Make a module of transformers look for adapters where it loads models, although PEFT is not installed."""
    if is_peft_available():
        return
    names = vars(import_module(module))
    own = names["find_adapter_config_file"]

    @functools.wraps(own)
    def find(model_id: Any, *args: Any, **kwargs: Any) -> str | None:
        file: str | None = own(model_id, *args, **kwargs)
        if file is not None and not os.path.exists(os.path.join(model_id, CONFIG_NAME)):
            base = json.loads(Path(file).read_text()).get("base_model_name_or_path")
            if not base:
                raise PeftcoreError(
                    f"the adapter '{model_id}' does not name its base model (base_model_name_or_path). Load the base "
                    "with from_pretrained, then the adapter: peftcore.load(model, ADAPTER)"
                )
        return file

    names.update(is_peft_available=lambda: True, find_adapter_config_file=find)


for _ours in (
    load_adapter,
    add_adapter,
    set_adapter,
    disable_adapters,
    enable_adapters,
    active_adapters,
    get_adapter_state_dict,
    delete_adapter,
):
    _patch(_ours.__name__, _ours)
find_adapters("transformers.integrations.peft")
