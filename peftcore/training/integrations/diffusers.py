"""Make calls of diffusers that would ignore adapters raise an error that names the alternative.

set_adapters, disable_lora, fuse_lora, ...     act on layers of PEFT alone, as does a scale in attention kwargs
fuse_qkv_projections, unfuse_qkv_projections   would make new layers without adapters
save_pretrained                                would write the base with tensors that cannot be loaded
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from peftcore.engine import require_state, state_of
from peftcore.engine.adaptation.adapted import is_adapted
from peftcore.errors import PeftcoreError
from peftcore.training.integrations.patching import replace
from peftcore.training.integrations.saving import merged_tensors

_CHOOSE = "Use peftcore.activate(model, NAME), peftcore.disabled(model), or peftcore.scale(model, NAME, 0.5)"
_MERGE = "Use peftcore.merge(model, undo=True) and peftcore.unmerge(model)"
_REMOVE = "Use peftcore.remove(model)"
_INSTEAD = {  # methods of diffusers' pipelines and models that act on layers of PEFT
    "set_adapters": _CHOOSE,
    "set_adapter": _CHOOSE,
    "disable_adapters": _CHOOSE,
    "enable_adapters": _CHOOSE,
    "disable_lora": _CHOOSE,
    "enable_lora": _CHOOSE,
    "fuse_lora": _MERGE,
    "unfuse_lora": _MERGE,
    "delete_adapters": _REMOVE,
    "unload_lora": _REMOVE,
    "unload_lora_weights": _REMOVE,
}
_PARTS = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
_FUSED = {"to_qkv", "to_kv", "to_added_qkv", "to_added_kv"}


def patch_model(model: nn.Module) -> None:
    """Make `model` and its model classes refuse calls that would ignore adapters."""
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.models.modeling_utils import ModelMixin

    if _refuse_scale not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_refuse_scale, with_kwargs=True)
    _refuse_calls(PeftAdapterMixin)
    replace(ModelMixin, "save_pretrained", _save_model)
    for name in ("fuse_qkv_projections", "unfuse_qkv_projections"):
        owner = next((cls for cls in type(model).__mro__ if name in vars(cls)), None)
        if owner is not None and owner.__module__.startswith("diffusers."):
            replace(owner, name, functools.partial(_fuse, name))


def patch_pipelines() -> None:
    """Make pipelines refuse calls that would ignore their models' adapters."""
    from diffusers.loaders.lora_base import LoraBaseMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    _refuse_calls(LoraBaseMixin)
    replace(DiffusionPipeline, "save_pretrained", _save_pipeline)


def _refuse_calls(cls: type) -> None:
    for name, instead in _INSTEAD.items():
        if name in vars(cls):
            replace(cls, name, functools.partial(_refuse, instead))


def _refuse(instead: str, library_object: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for model in getattr(library_object, "components", {"": library_object}).values():
        state = state_of(model) if isinstance(model, nn.Module) else None
        if state is not None:
            raise PeftcoreError(
                "This call only acts on layers of PEFT, so it would ignore peftcore's adapters on "
                f"{type(model).__name__}: {', '.join(state.applied)}. {instead}"
            )
    return original(*args, **kwargs)


def _refuse_scale(model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"):
        scale = (kwargs.get(name) or {}).get("scale", 1.0)
        if scale != 1.0 and state_of(model) is not None:
            raise PeftcoreError(
                f"{name}={{'scale': {scale}}} only acts on layers of PEFT, so it would ignore peftcore's adapters on "
                f"{type(model).__name__}. Leave it out, and call peftcore.scale(model, NAME, {scale}) before"
            )


def _fuse(name: str, model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    replaced = _FUSED if name.startswith("un") else _PARTS
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in replaced and is_adapted(module):
            raise PeftcoreError(
                f"{name} would replace '{path}' and other layers by new layers without adapters. Call it before "
                "applying adapters, or remove them first: peftcore.remove(model)"
            )
    return original(*args, **kwargs)


def _save_model(model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if state_of(model) is None:
        return original(*args, **kwargs)
    if require_state(model).merged is None:
        raise PeftcoreError(
            f"save_pretrained would write the weights of {type(model).__name__} without its adapters. Save the "
            "adapters with peftcore.save(model, folder, format='diffusers'), or merge them first: peftcore.merge(model)"
        )
    tensors = merged_tensors(model.state_dict())
    model.__dict__["state_dict"] = lambda: tensors
    try:
        return original(*args, **kwargs)
    finally:
        del model.__dict__["state_dict"]


def _save_pipeline(pipe: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for name, model in pipe.components.items():
        state = state_of(model) if isinstance(model, nn.Module) else None
        if state is not None and state.merged is None:
            raise PeftcoreError(
                f"save_pretrained cannot write the adapters of '{name}' ({type(model).__name__}). Save the "
                "adapters with peftcore.save(pipe.components, folder, format='diffusers'), or merge them "
                f"first: peftcore.merge(pipe.{name})"
            )
    return original(*args, **kwargs)
