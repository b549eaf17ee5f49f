"""diffusers on a model with adapters: calls that would ignore the adapters raise an error that says what to do instead.

    scale in attention kwargs, set_adapters, disable_lora, fuse_lora, ...    address layers of PEFT
    save_pretrained                    would write the base, with tensors that cannot be loaded
    fuse_qkv_projections, unfuse_...   would make new layers without adapters

Importing this module patches diffusers; `patch_model` patches the class of a model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from peftcore.adaptation.adapted import is_adapted
from peftcore.adaptation.base_modules import CHILD, TRAINED
from peftcore.engine import require_state, state_of
from peftcore.errors import PeftcoreError
from peftcore.integrations.patching import patch

FORMAT = "diffusers"  # `save(format=)`
_CHOOSE = "Use peftcore.activate(model, NAME), peftcore.disabled(model), or peftcore.scale(model, NAME, 0.5)"
_REMOVE = "Remove adapters with peftcore.remove(model)"
_MERGE = "Merge adapters with peftcore.merge(model), and unmerge them with peftcore.unmerge(model)"
_PARTS = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
_FUSED = {"to_qkv", "to_kv", "to_added_qkv", "to_added_kv"}
_OF_MODELS = {  # functions of diffusers whose first argument is a model
    "scale_lora_layers": "Do not pass scale; use peftcore.scale(model, NAME, 0.5)",
    "set_adapter_layers": _CHOOSE,
    "set_weights_and_activate_adapters": _CHOOSE,
    "delete_adapter_layers": _REMOVE,
    "recurse_remove_peft_layers": _REMOVE,
    "fuse_text_encoder_lora": _MERGE,
    "unfuse_text_encoder_lora": _MERGE,
}


def _refusal(model: Any, instead: str) -> PeftcoreError:
    return PeftcoreError(
        "this call of diffusers addresses layers of PEFT and would ignore peftcore's adapters on "
        f"{type(model).__name__}: {', '.join(require_state(model).applied)}. {instead}"
    )


def _refusing(own: Callable[..., Any], instead: str) -> Callable[..., Any]:
    @functools.wraps(own)
    def function(model: Any, *args: Any, **kwargs: Any) -> Any:
        changes_nothing = own.__name__ == "scale_lora_layers" and (*args, *kwargs.values()) == (1.0,)
        if not changes_nothing and isinstance(model, nn.Module) and state_of(model) is not None:
            raise _refusal(model, instead)
        return own(model, *args, **kwargs)

    return function


def _replace(name: str, instead: str) -> None:
    """Replace a function of diffusers in every module that imported it."""
    there = [module for key, module in sys.modules.items() if key.startswith("diffusers.") and name in vars(module)]
    if there:
        ours = _refusing(vars(there[0])[name], instead)
        for module in there:
            setattr(module, name, ours)


def _refuse(instead: str, model: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise _refusal(model, instead)


def _save_pretrained(model: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if require_state(model).merged is None:
        raise PeftcoreError(
            f"save_pretrained would write the weights of {type(model).__name__} without its adapters. Save the "
            f"adapters with peftcore.save(model, folder, format={FORMAT!r}), or merge them first: peftcore.merge(model)"
        )
    plain = {name: t for name, t in model.state_dict().items() if not {CHILD, TRAINED} & set(name.split("."))}
    model.__dict__["state_dict"] = lambda: plain
    try:
        return own(*args, **kwargs)
    finally:
        del model.__dict__["state_dict"]


def patch_model(model: nn.Module) -> None:
    """Make the class of `model` refuse to fuse or unfuse projections that have adapters."""
    for name in ("fuse_qkv_projections", "unfuse_qkv_projections"):
        owner = next((cls for cls in type(model).__mro__ if name in vars(cls)), None)
        if owner is not None and owner.__module__.startswith("diffusers.") and not _is_ours(vars(owner)[name]):
            setattr(owner, name, _fusing(vars(owner)[name]))


def _fusing(own: Callable[..., Any]) -> Callable[..., Any]:
    concerned = _FUSED if own.__name__.startswith("un") else _PARTS

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        for path, module in self.named_modules():
            if path.rpartition(".")[2] in concerned and is_adapted(module):
                raise PeftcoreError(
                    f"{own.__name__} would replace '{path}' and other layers by new ones without adapters. Call "
                    "it before applying adapters, or remove them first: peftcore.remove(model)"
                )
        return own(self, *args, **kwargs)

    method._peftcore = True  # type: ignore[attr-defined]
    return method


def _is_ours(function: Any) -> bool:
    return bool(getattr(function, "_peftcore", False))


for _name, _instead in _OF_MODELS.items():
    _replace(_name, _instead)
for _instead, _names in (
    (_MERGE, ("fuse_lora", "unfuse_lora")),
    (_CHOOSE, ("set_adapter", "disable_adapters", "enable_adapters")),
):
    for _name in _names:
        patch(PeftAdapterMixin, _name, functools.partial(_refuse, _instead), lambda model: model)
patch(ModelMixin, "save_pretrained", _save_pretrained, lambda model: model)
