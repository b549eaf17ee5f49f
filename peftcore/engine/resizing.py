"""Refuse to resize a vocabulary while adapters are attached to its embedding or head.

transformers would replace the head by a new module without its adapter, and an adapter of the embedding would keep the
old number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from peftcore.engine.adaptation.adapted import adapters_of
from peftcore.engine.changed_modules import module_at
from peftcore.engine.state import state_of
from peftcore.engine.trained_parameters import all_of
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import base_modules
from peftcore.plugin.events import vocabulary_resizes


def refuse_resize(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Raise a PeftcoreError if an adapter is attached to one of `modules` or trains its parameters.

    Args:
        model: the model, or the submodule that contains `modules`.
        modules: modules whose number of rows is about to change, along with modules tied to them.
    """
    state = state_of(model)
    if state is not None and state.merged is not None:
        return  # only base weights are resized; `unmerge` reports that the originals no longer fit
    resized_modules = set(modules)
    weights = {module._parameters.get("weight") for module in resized_modules} - {None}
    for path, module in base_modules(model) if resized_modules else ():
        if module not in resized_modules and module._parameters.get("weight") not in weights:
            continue
        adapter = next(_adapters(model, module), None)
        if adapter is not None:
            raise PeftcoreError(
                f"resize_token_embeddings would resize '{path}', and the adapter '{adapter}' on it would no longer "
                "fit. Nothing was changed. Resize the model before peftcore.apply, or first remove the adapter: "
                f"peftcore.remove(model, '{adapter}')"
            )


def _adapters(model: nn.Module, module: nn.Module) -> Iterator[str]:
    """Yield the names of adapters that are attached to `module` or own parameters in it."""
    module_adapters = adapters_of(module)
    yield from () if module_adapters is None else module_adapters._modules
    for name, tensors in all_of(model):
        if any(module_at(model, path) is module for path in tensors.by_module()):
            yield name


vocabulary_resizes.subscribe(refuse_resize)
