"""Make a method's config from its name and fields, or from a config object of Hugging Face PEFT."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from torch import nn

from peftcore.errors import PeftcoreError, nearest_field
from peftcore.model import detect
from peftcore.model.base_modules import base_modules
from peftcore.model.experts import experts_layout
from peftcore.plugin.method import Method
from peftcore.plugin.peft_fields import COMMON, config_of_fields, method_of_fields, of_peft_type, why_unknown
from peftcore.plugin.registry import registry
from peftcore.plugin.validation import check_types


def config(method: str, /, **fields: Any) -> Any:
    """Return a config of an installed method, for `apply` or the `peft_config` of TRL's trainers.

    Args:
        method: name of the method.
        fields: fields of the config; all other fields have their defaults.

    Raises:
        PluginError: the method is not installed or broken.
        PeftcoreError: a field does not exist, is missing, or has a wrong value.

    Examples:
        >>> config = peftcore.config("lora", r=16, lora_alpha=32)
        >>> peftcore.apply(model, config)
    """
    config_class = registry.method(method).config_class
    field_names = [field.name for field in dataclasses.fields(config_class)]
    for name, value in fields.items():
        if name not in field_names:
            reason = _habit(name, value) or why_unknown(registry.method(method), name, value)
            hint = "" if reason else nearest_field(name, field_names)
            raise PeftcoreError(
                f"{config_class.__name__} has no field '{name}'{hint or reason}{('' if hint.endswith('?') else '.')} "
                f"Its fields are: {', '.join(field_names)}"
            )
    check_types(config_class, fields)
    try:
        return config_class(**fields)
    except TypeError as error:
        raise PeftcoreError(f"{config_class.__name__}: {error}") from error


def _habit(name: str, value: object) -> str:
    """Return a hint for an argument of PEFT that is not a config field in peftcore; empty if there is none."""
    if name == "adapter_name":
        return f". To name the adapter, pass adapter={value!r} to apply or load"
    if name in COMMON:
        return f". PEFT's {name} has no effect in peftcore. Leave it out"
    return ""


_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks whose heads PEFT always trains


def is_of_peft(config: Any) -> bool:
    """Return whether `config` is one of PEFT's configs, without importing PEFT."""
    return any(f"{cls.__module__}.{cls.__name__}" == "peft.config.PeftConfigMixin" for cls in type(config).__mro__)


def config_of_peft(model: nn.Module, config: Any) -> tuple[Method, Any]:
    """Return (method, config) for a config object of PEFT, as if read from an `adapter_config.json`.

    Defaults for the type of model, such as `target_modules`, are filled in by PEFT.

    Raises:
        PluginError: no installed method reads the config, or several do.
        PeftcoreError: the config has a field or value that the method does not support.
    """
    config_name = f"peft.{type(config).__name__}"
    peft_type = _plain(getattr(config, "peft_type", None))
    if isinstance(peft_type, str) and not of_peft_type(peft_type):
        # PEFT would fail when it fills in fields, so raise a clear error first.
        method_of_fields(config_name, {"peft_type": peft_type})
    config = _with_peft_defaults(config_name, model, config)
    fields = {name: _plain(value) for name, value in config.to_dict().items()}
    for name, value in vars(config).items():  # fields that PEFT does not write to files, if they are set
        if name not in fields and value is not None and not _is_as_made(config, name, value):
            fields[name] = _plain(value)
    if not isinstance(fields.get("peft_type"), str):
        raise PeftcoreError(f"{config_name} has no peft_type. Pass the config of one of PEFT's methods")
    method = method_of_fields(config_name, fields, choose="peftcore.apply(model, 'NAME', FIELD=...)")
    return method, _as_fresh(config_name, method, config_of_fields(config_name, method, fields, PeftcoreError))


def _with_peft_defaults(config_name: str, model: nn.Module, config: Any) -> Any:
    """Return a copy with defaults from PEFT's tables of model types."""
    config = copy.deepcopy(config)
    if getattr(config, "modules_to_save", None):
        heads = detect(model).task_heads if _plain(config.task_type) in _WITH_HEADS else ()
        config.modules_to_save = [*config.modules_to_save, *ends_within_a_name(model, config.modules_to_save), *heads]
    if hasattr(config, "target_modules"):  # prompts have none
        _name_experts(config_name, model, config)
        _refuse_experts(config_name, model, config)
        _fill_in_targets(config_name, model, config)
    return config


def _fill_in_targets(config_name: str, model: nn.Module, config: Any) -> None:
    """Replace None in fields of module names by PEFT's default for the type of model.

    PEFT has a table for each `peft_type` and field. Without a table, the method's own meaning of None applies.
    """
    tables = vars(importlib.import_module("peft.utils.constants"))
    peft_type = _plain(config.peft_type).replace("_", "")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for field in ("target_modules", "feedforward_modules"):
        table = tables.get(f"TRANSFORMERS_MODELS_TO_{peft_type}_{field.upper()}_MAPPING")
        if table is None or getattr(config, field, ()) is not None:
            continue
        if model_type in table:
            defaults = table[model_type]
            setattr(config, field, defaults if isinstance(defaults, str) else set(defaults))
        elif not getattr(config, "target_parameters", None):
            raise PeftcoreError(
                f"{config_name} has no {field}, and PEFT has no default for {type(model).__name__}. Name modules: "
                f"{field}=[...]"
            )


def _name_experts(config_name: str, model: nn.Module, config: Any) -> None:
    """Make `target_modules` select expert layers that transformers 5 stacks into `[experts, out, in]`, as PEFT does.

    For the models in PEFT's table, `gate_proj` and `up_proj` together become `gate_up_proj` with twice the rank, and
    `all-linear` includes experts and the router. For other models `all-linear` excludes experts.
    """
    try:
        conversion: Any = importlib.import_module("peft.utils.transformers_weight_conversion")
        convert = conversion.convert_peft_config_for_transformers
    except (ImportError, AttributeError):  # another version of PEFT, or transformers 4, where experts are layers
        return
    try:
        convert(config, model=model, conversions=None)
    except ValueError as error:
        raise PeftcoreError(f"{config_name} does not fit {type(model).__name__}: {error}") from error


def _refuse_experts(config_name: str, model: nn.Module, config: Any) -> None:
    """Reject an entry that would select experts in peftcore but that PEFT ignores, since it matches no module."""
    entries = getattr(config, "target_modules", None)
    if not entries or isinstance(entries, str) or hasattr(config, "target_parameters"):
        return
    modules = dict(base_modules(model))
    weights: list[str] = []
    for path, module in modules.items():
        layout = experts_layout(module)
        weights += [] if layout is None else [f".{path}.{name}" for name in layout.names]
    for entry in entries:
        means_module = any(f".{path}".endswith(f".{entry}") for path in modules)
        if not means_module and any(weight.endswith(f".{entry}") for weight in weights):
            raise PeftcoreError(
                f"{config_name} names '{entry}' in target_modules, which is not a layer of {type(model).__name__}. "
                "PEFT ignores this entry, but in peftcore it would select experts. Leave it out, or apply the method "
                "by name with these fields"
            )


def ends_within_a_name(model: nn.Module, modules_to_save: Iterable[str]) -> list[str]:
    """Return paths that only PEFT matches, because it also compares inside names: `norm` matches `input_layernorm`."""
    names = tuple(modules_to_save)
    whole_names = tuple(f".{name}" for name in names)
    return [path for path, _ in base_modules(model) if path.endswith(names) and not f".{path}".endswith(whole_names)]


def _plain(value: Any) -> Any:
    """Convert a value to JSON types."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    return value


def _is_as_made(config: Any, name: str, value: Any) -> bool:
    """Return whether an attribute that is not saved has its initial value."""
    constants = vars(type(config))  # such as `is_prompt_learning`
    if name in constants and constants[name] is value:
        return True
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return bool(value == type(value)())
    try:
        return bool(getattr(type(config)(), name) == value)
    except Exception:  # the class has required arguments
        return False


def _as_fresh(config_name: str, method: Method, config: Any) -> Any:
    """Reset the fields that are not saved to their defaults: reading from a file has set other values."""
    on_disk = method.state.write_fields(dataclasses.asdict(config))
    for field in dataclasses.fields(config):
        if field.name in on_disk or field.default is dataclasses.MISSING:
            continue
        fresh = dataclasses.replace(config, **{field.name: field.default})
        if method.state.write_fields(dataclasses.asdict(fresh)) == on_disk:
            config = fresh
    return config
