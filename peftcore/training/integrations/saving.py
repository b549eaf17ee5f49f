"""Patch `save_pretrained`, which would lose or misplace adapters.

transformers             writes the adapters in Hugging Face PEFT's format; after `merge` the merged model
sentence-transformers    an error: its `load` would ignore the adapters' tensors in its file
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peftcore.engine import require_state, state_of
from peftcore.errors import PeftcoreError
from peftcore.files.saving import save
from peftcore.model.base_modules import CHILD, TRAINED
from peftcore.plugin import sharded
from peftcore.training.integrations.patching import replace


def patch_transformers(_model: nn.Module) -> None:
    """Make `PreTrainedModel.save_pretrained` save adapters."""
    from transformers import PreTrainedModel

    replace(PreTrainedModel, "save_pretrained", _save_transformers)


def patch_sentence_transformers(model: nn.Module) -> None:
    """Make the class of `model` refuse to save adapters."""
    for name in ("save", "save_pretrained"):
        owner = next((cls for cls in type(model).__mro__ if name in vars(cls)), None)
        if owner is not None and owner.__module__.partition(".")[0] == "sentence_transformers":
            replace(owner, name, _save_sentence_transformers)


def merged_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the base's tensors in a state dict."""
    return {name: t for name, t in tensors.items() if not {CHILD, TRAINED} & set(name.split("."))}


def _save_transformers(model: Any, original: Callable[..., Any], save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    if state_of(model) is None:
        return original(save_directory, *args, **kwargs)
    names = ("is_main_process", "state_dict", "push_to_hub")  # in transformers' order
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    is_main_process = options.get("is_main_process", True)
    if require_state(model).merged is not None:
        tensors = options.get("state_dict")
        options["state_dict"] = merged_tensors(model.state_dict() if tensors is None else tensors)
        return original(save_directory, **options)
    if is_main_process or sharded.is_sharded(model):
        save(model, save_directory)
    if options.get("push_to_hub") and is_main_process:
        push_arguments = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")
        upload = {name: options[name] for name in push_arguments if name in options}
        model.push_to_hub(upload.pop("repo_id", str(save_directory).rstrip("/").rpartition("/")[2]), **upload)
    return None


def _save_sentence_transformers(model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    state = state_of(model)
    if state is not None:
        raise PeftcoreError(
            f"cannot save {type(model).__name__} with the adapters {', '.join(state.applied)}, because its class "
            "could not load the file. Save the adapters with peftcore.save(model, folder), or merge them first: "
            "peftcore.merge(model)"
        )
    return original(*args, **kwargs)
