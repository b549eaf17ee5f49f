"""`peft_config=` of TRL's trainers with a config of peftcore.

    SFTTrainer(model="ORG/NAME", peft_config=peftcore.config("METHOD", r=16), ...)

TRL's constructors check the config's class and call PEFT at the point where the model has been loaded, seeds are set,
and tokens have been added. While such a constructor runs, the names of PEFT in its module are replaced, so that
peftcore applies its config at that point. PEFT need not be installed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftcore import engine
from peftcore.errors import PeftcoreError
from peftcore.registry import registry

_APPLIES = ("get_peft_model", "prepare_peft_model")  # names of functions that apply `peft_config`
_ADDED_TO = ("modules_to_save", "trainable_token_indices")  # fields that TRL sets if the chat template adds tokens


def is_of_peftcore(config: Any) -> bool:
    """Return whether `config` is the config of an installed method."""
    return dataclasses.is_dataclass(config) and any(
        type(config) is method.config_class for method in registry.methods().values()
    )


class _Config:
    """A config whose fields TRL may change. Fields that the method does not have are None."""

    def __init__(self, config: Any) -> None:
        self._config = config
        for name in (*_ADDED_TO, *(field.name for field in dataclasses.fields(config))):
            value = getattr(config, name, None)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    def changed(self) -> Any:
        """Return the config with the changes."""
        config = self._config
        before = vars(_Config(config))
        changes = {name: value for name, value in vars(self).items() if value != before[name]}
        unknown = sorted(changes.keys() - {field.name for field in dataclasses.fields(config)})
        if unknown:
            raise PeftcoreError(
                f"the chat template adds tokens, which the method needs {unknown} to train, but "
                f"{type(config).__name__} has no such fields. Use another method, or a tokenizer with a chat template"
            )
        return dataclasses.replace(config, **changes)


class _NotUsed:
    """Class without instances."""


@contextmanager
def applying(
    own: Callable[..., None], bound: inspect.BoundArguments, applied: Callable[[nn.Module], object]
) -> Iterator[None]:
    """Make the constructor `own` apply `peft_config` of its arguments through peftcore, and then call `applied`.

    A constructor that only passes `peft_config` on is unchanged.
    """
    function = inspect.unwrap(own)
    if "peft_config" not in bound.arguments or not set(_APPLIES) & set(function.__code__.co_names):
        yield
        return
    wrapped = bound.arguments["peft_config"] = _Config(bound.arguments["peft_config"])

    def apply(model: nn.Module, config: Any, *_args: Any, **_kwargs: Any) -> nn.Module:
        engine.apply(model, wrapped.changed())
        applied(model)
        return model

    def unchanged(model: nn.Module, *_args: Any, **_kwargs: Any) -> nn.Module:
        return model

    names = function.__globals__
    ours: dict[str, Any] = {
        "is_peft_available": lambda: True,
        "PeftConfig": _Config,
        "get_peft_model": apply,
        "prepare_peft_model": apply,
        "prepare_model_for_kbit_training": unchanged,  # adapters are float32 and norms keep their dtype
        "peft_module_casting_to_bf16": lambda _model: None,
    }
    # Classes of PEFT that the module has not imported, since PEFT is not installed.
    ours |= {name: _NotUsed for name in function.__code__.co_names if name[0].isupper() and name not in {*names, *ours}}
    before = {name: names[name] for name in ours if name in names}
    names.update(ours)
    try:
        yield
    finally:
        names.update(before)
        for name in ours.keys() - before.keys():
            del names[name]
