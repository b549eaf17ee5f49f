"""A config object of Hugging Face PEFT's in place of a file's fields: what the one may say, the other may say."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from torch import nn

from peftcore.adaptation.adapted import base_modules
from peftcore.errors import PeftcoreError
from peftcore.experts import experts_layout
from peftcore.method import Method
from peftcore.observation import detect
from peftcore.peft_fields.method_choice import method_of_fields, of_peft_type
from peftcore.peft_fields.method_config import config_of_fields

_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks whose heads PEFT trains, whatever else it trains


def is_of_peft(config: Any) -> bool:
    """Is it one of PEFT's configs? PEFT is not imported for the answer."""
    return any(f"{cls.__module__}.{cls.__name__}" == "peft.config.PeftConfigMixin" for cls in type(config).__mro__)


def config_of_peft(model: nn.Module, config: Any) -> tuple[Method, Any]:
    """(the method that reads an object of PEFT's, its config), by the way of an `adapter_config.json`.

    What PEFT fills in for a kind of model, such as `target_modules`, it fills in here.

    Raises:
        PluginError: no installed method reads it, or several do.
        PeftcoreError: it says something that the method does not know.
    """
    where = f"peft.{type(config).__name__}"
    peft_type = _plain(getattr(config, "peft_type", None))
    if isinstance(peft_type, str) and not of_peft_type(peft_type):
        method_of_fields(where, {"peft_type": peft_type})  # which says so, before PEFT looks for what it would fill in
    config = _completed(where, model, config)
    fields = {name: _plain(value) for name, value in config.to_dict().items()}
    for name, value in vars(config).items():  # what PEFT writes to no file, where it has been set
        if name not in fields and value is not None and not _is_as_made(config, name, value):
            fields[name] = _plain(value)
    if not isinstance(fields.get("peft_type"), str):
        raise PeftcoreError(f"{where} names no peft_type: give the config of a method")
    method = method_of_fields(where, fields, say="peftcore.apply(model, '{}', FIELD=...)")
    return method, _as_fresh(where, method, config_of_fields(where, method, fields, PeftcoreError))


def _completed(where: str, model: nn.Module, config: Any) -> Any:
    """A copy in which PEFT has filled in what it takes from its tables of models."""
    config = copy.deepcopy(config)
    if getattr(config, "modules_to_save", None):
        heads = detect(model).task_heads if _plain(config.task_type) in _WITH_HEADS else ()
        config.modules_to_save = [*config.modules_to_save, *ends_within_a_name(model, config.modules_to_save), *heads]
    tuner: Any = getattr(sys.modules["peft"], "PEFT_TYPE_TO_TUNER_MAPPING", {}).get(config.peft_type)
    prepare = None if tuner is None else getattr(tuner.__new__(tuner), "_prepare_adapter_config", None)
    if prepare is None:  # of prompts, or another PEFT's
        if getattr(config, "target_modules", ()) is None:
            raise PeftcoreError(f"{where} names no target_modules. Name them, or 'all-linear'")
        return config
    _name_experts(where, model, config)
    _refuse_experts(where, model, config)
    of_model: Any = getattr(model, "config", None)
    known = of_model.to_dict() if hasattr(of_model, "to_dict") else {}
    try:
        return prepare(config, {"model_type": "custom", **known})
    except ValueError as error:
        raise PeftcoreError(
            f"{where} does not say which modules, and PEFT has no table for {type(model).__name__} ({error})"
        ) from error


def _name_experts(where: str, model: nn.Module, config: Any) -> None:
    """Let `target_modules` of layers that transformers 5 made parameters `[experts, out, in]` mean these, as in PEFT.

    By its own table of models: `gate_proj` and `up_proj` together are `gate_up_proj`, of twice the rank, and all that
    is linear is they and the router. What is in no table, `all-linear` leaves out.
    """
    try:
        conversion: Any = importlib.import_module("peft.utils.transformers_weight_conversion")
        convert = conversion.convert_peft_config_for_transformers
    except (ImportError, AttributeError):  # another PEFT, or transformers 4, whose experts are layers
        return
    try:
        convert(config, model=model, conversions=None)
    except ValueError as error:
        raise PeftcoreError(f"{where} does not fit {type(model).__name__}: {error}") from error


def _refuse_experts(where: str, model: nn.Module, config: Any) -> None:
    """Of an entry that means no module, which PEFT passes over beside others, and which means experts here."""
    named = getattr(config, "target_modules", None)
    if not named or isinstance(named, str) or hasattr(config, "target_parameters"):
        return
    modules = dict(base_modules(model))
    layouts = ((path, layout) for path, module in modules.items() if (layout := experts_layout(module)) is not None)
    weights = [f".{path}.{name}" for path, layout in layouts for name in layout.names]
    for entry in named:
        means_module = any(f".{path}".endswith(f".{entry}") for path in modules)
        if not means_module and any(weight.endswith(f".{entry}") for weight in weights):
            raise PeftcoreError(
                f"{where} names '{entry}' in target_modules, which is no layer of {type(model).__name__}: PEFT passes "
                "over it, and here it would mean experts. Leave it out, or apply the method by name with these fields"
            )


def ends_within_a_name(model: nn.Module, modules_to_save: Iterable[str]) -> list[str]:
    """What PEFT finds by the end of a path, and others do not: for it `norm` means `input_layernorm`, too."""
    named = tuple(modules_to_save)
    whole = tuple(f".{name}" for name in named)
    return [path for path, _ in base_modules(model) if path.endswith(named) and not f".{path}".endswith(whole)]


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {_plain(name): _plain(each) for name, each in value.items()}
    return value


def _is_as_made(config: Any, name: str, value: Any) -> bool:
    """Return whether an attribute that no file holds has the value that every object has from the start."""
    if (
        name in vars(type(config)) and vars(type(config))[name] is value
    ):  # a constant of the class, such as `is_prompt_learning`
        return True
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return bool(value == type(value)())
    try:
        return bool(getattr(type(config)(), name) == value)
    except Exception:  # there is no object without arguments
        return False


def _as_fresh(where: str, method: Method, config: Any) -> Any:
    """The config with the defaults of fields that no file holds: reading sets them, as for values that are there."""
    on_disk = method.state.write_config(dataclasses.asdict(config))
    for field in dataclasses.fields(config):
        if field.name in on_disk or field.default is dataclasses.MISSING:
            continue
        fresh = dataclasses.replace(config, **{field.name: field.default})
        if method.state.write_config(dataclasses.asdict(fresh)) == on_disk:
            config = fresh
    return config
