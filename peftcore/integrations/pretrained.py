"""transformers is taught of adapters on its models when the first one is applied; nothing of it is replaced otherwise.

    model.save_pretrained(folder)     the adapters, in Hugging Face PEFT's format; after `merge` the merged model
    Trainer(model=model, ...)         see `peftcore.integrations.transformers`
    get_peft_model(model, ...)        is refused, see `peftcore.integrations.peft`

Each method that is taught asks first whether adapters stand on the model, and is transformers' own where none does.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel

import peftcore
from peftcore.adaptation.adapted import CHILD, TRAINED
from peftcore.engine import require_state, state_of

_TAUGHT = {  # others' modules that are taught when they are imported, each by one of ours
    "transformers.trainer": "peftcore.integrations.transformers",
    "peft": "peftcore.integrations.peft",
}


def teach(cls: type, name: str, ours: Callable[..., Any], model_of: Callable[[Any], Any]) -> None:
    """Let `cls.name` be `ours(self, own, *args, **kwargs)` where `model_of(self)` has adapters; `own` is its own."""
    own = getattr(cls, name)

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = model_of(self)
        if model is None or state_of(model) is None:
            return own(self, *args, **kwargs)
        return ours(self, functools.partial(own, self), *args, **kwargs)

    setattr(cls, name, method)


def save_pretrained(
    model: PreTrainedModel,
    own: Callable[..., Any],
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> Any:
    """`PreTrainedModel.save_pretrained` of a model with adapters. `state_dict` is not needed for the adapters."""
    if require_state(model).merged is not None:
        held = model.state_dict() if state_dict is None else state_dict
        held = {name: t for name, t in held.items() if not {CHILD, TRAINED} & set(name.split("."))}
        options |= {"is_main_process": is_main_process, "state_dict": held, "push_to_hub": push_to_hub}
        return own(save_directory, **options)
    if is_main_process or peftcore.ranks.is_sharded(model):
        peftcore.save(model, save_directory)
    if push_to_hub and is_main_process:
        names = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")
        chosen = {name: options[name] for name in names if name in options}
        model.push_to_hub(chosen.pop("repo_id", str(save_directory).rstrip("/").rpartition("/")[2]), **chosen)
    return None


class _When(MetaPathFinder):
    """Import `ours` when another library's module `theirs` is imported: those who never do should not pay for it."""

    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs, self.ours = theirs, ours

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            importlib.import_module(self.ours)

        spec.loader.exec_module = exec_module
        return spec


teach(PreTrainedModel, "save_pretrained", save_pretrained, lambda model: model)
for _theirs, _ours in _TAUGHT.items():
    if _theirs in sys.modules:
        importlib.import_module(_ours)
    else:
        sys.meta_path.insert(0, _When(_theirs, _ours))
