"""Refuse settings of TRL's trainers and Liger that give wrong results for a model with adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peftcore import engine
from peftcore.engine.adaptation.adapted import adapters_of
from peftcore.errors import PeftcoreError
from peftcore.training.integrations.reference_model import ReferenceModel

if TYPE_CHECKING:
    from transformers import Trainer


def refuse_arguments(trainer: Trainer) -> None:
    """Refuse training arguments that would ignore adapters, or change a reference that shares the model's weights."""
    args: Any = trainer.args
    if getattr(args, "sync_ref_model", False):
        raise PeftcoreError(
            "sync_ref_model=True updates the weights of the reference, but with adapters it shares them with the "
            "model. Set sync_ref_model=False; to update the reference, start a new run from the saved adapter"
        )
    if getattr(args, "use_vllm", hasattr(args, "vllm_server_base_url")):
        raise PeftcoreError(
            "with use_vllm=True, vLLM would generate with the base alone, without the adapters. Set use_vllm=False "
            "to generate with the model itself; trainers that always use vLLM do not work with adapters"
        )


def refuse_before_training(trainer: Trainer, model: nn.Module) -> None:
    """Refuse a trainer whose references, callbacks or fused losses are wrong for adapters of `model`."""
    _refuse_second_base(trainer, model)
    _refuse_averages(trainer)
    _refuse_bypassed_head(trainer, model)


def _refuse_second_base(trainer: Trainer, model: nn.Module) -> None:
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    for name, value in vars(trainer).items():
        # A teacher may be given as a path, without adapters.
        if not isinstance(value, nn.Module) or name.startswith("teacher"):
            continue
        value = trainer.accelerator.unwrap_model(value, keep_torch_compile=False)
        if isinstance(value, ReferenceModel):
            if trainer.is_deepspeed_enabled:
                raise PeftcoreError(
                    f"DeepSpeed would prepare trainer.{name} as an independent model, although it shares its weights "
                    "with the trained model. Train without DeepSpeed, or pass a separate model: ref_model=..."
                )
            continue
        is_same_base = bool(path) and getattr(getattr(value, "config", None), "_name_or_path", None) == path
        if is_same_base and type(value).__name__ == type(model).__name__ and engine.state_of(value) is None:
            raise PeftcoreError(
                f"trainer.{name} of {type(trainer).__name__} is a second copy of '{path}' without the model's adapters "
                "and quantization. Pass ref_model=peftcore.reference_model(model), or, for a trainer without "
                f"ref_model=, set trainer.{name} = peftcore.reference_model(model) before train()"
            )


def _refuse_averages(trainer: Trainer) -> None:
    for callback in trainer.callback_handler.callbacks:
        names = {cls.__name__ for cls in type(callback).__mro__}
        if "SyncRefModelCallback" in names or getattr(callback, "update_ref_model", False):
            raise PeftcoreError(
                f"{type(callback).__name__} writes averages into the weights of a reference or teacher, which are "
                "also the weights of the model. Leave the callback out, or disable it in the arguments"
            )
        if "BEMACallback" in names:
            raise PeftcoreError(
                f"{type(callback).__name__} averages weights into a second model with the same config but without "
                "adapters. Leave the callback out, and average a copy: torch.optim.swa_utils.AveragedModel(model)"
            )


def _refuse_bypassed_head(trainer: Trainer, model: nn.Module) -> None:
    # TRL gives the model a forward that multiplies by the head's weight in tiles; Liger's does the same. Its name and
    # parameters differ between TRL's versions, but not the package that defines it.
    forward = getattr(model.__dict__.get("forward"), "__func__", None)
    fused = getattr(forward, "__globals__", {}).get("__name__", "").startswith("trl.")
    if not fused and not getattr(trainer.args, "use_liger_kernel", False):
        return
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module, label, leave_out in ((head, "output head", "exclude_modules=['lm_head']"), (model, "whole model", "")):
        if isinstance(module, nn.Module) and adapters_of(module) is not None:
            raise PeftcoreError(
                f"{type(trainer).__name__} reads the head's weight without calling the {label}, so its adapter "
                f"would neither be used nor trained. Do not adapt it{': ' + leave_out if leave_out else ''}"
            )
