"""transformers' `save_pretrained` on a model with adapters.

    model.save_pretrained(folder)     the adapters, in Hugging Face PEFT's format; after `merge` the merged model

Importing this module patches `PreTrainedModel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from peftcore import ranks
from peftcore.adaptation.base_modules import CHILD, TRAINED
from peftcore.engine import require_state
from peftcore.files.saving import save
from peftcore.integrations.patching import patch


def save_pretrained(
    model: PreTrainedModel,
    own: Callable[..., Any],
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> Any:
    """Implement `PreTrainedModel.save_pretrained` for a model with adapters; `state_dict` is not used for them."""
    if require_state(model).merged is not None:
        held = model.state_dict() if state_dict is None else state_dict
        held = {name: t for name, t in held.items() if not {CHILD, TRAINED} & set(name.split("."))}
        options |= {"is_main_process": is_main_process, "state_dict": held, "push_to_hub": push_to_hub}
        return own(save_directory, **options)
    if is_main_process or ranks.is_sharded(model):
        save(model, save_directory)
    if push_to_hub and is_main_process:
        names = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")
        chosen = {name: options[name] for name in names if name in options}
        model.push_to_hub(chosen.pop("repo_id", str(save_directory).rstrip("/").rpartition("/")[2]), **chosen)
    return None


patch(PreTrainedModel, "save_pretrained", save_pretrained, lambda model: model)
