"""Refusal to resize a vocabulary while adapters are attached to its embedding or head.

transformers puts a new head in place of the old one, and the adapter would drop out of `forward`; an adapter of an
embedding has the old number of rows.
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
        model: the model, or the part of it that `modules` are in.
        modules: those whose number of rows is about to change, and with them that of what is tied to them.
    """
    state = state_of(model)
    if state is not None and state.merged is not None:
        return  # the base's own weights are resized; `unmerge` says that they no longer fit
    resized = set(modules)
    weights = {id(weight) for module in resized for weight in [module._parameters.get("weight")] if weight is not None}
    for path, module in base_modules(model) if resized else ():
        if module not in resized and id(module._parameters.get("weight")) not in weights:
            continue
        adapter = next(_adapters(model, module), None)
        if adapter is not None:
            raise PeftcoreError(
                f"resize_token_embeddings would resize '{path}', which the adapter '{adapter}' changes or trains, and "
                "the adapter would not fit or not act any more. Nothing was changed. Resize the model before "
                f"peftcore.apply, or first remove the adapter: peftcore.remove(model, '{adapter}')"
            )


def _adapters(model: nn.Module, module: nn.Module) -> Iterator[str]:
    """Yield the names of adapters that are attached to `module` or own parameters in it."""
    attached = adapters_of(module)
    yield from () if attached is None else attached._modules
    for name, own in all_of(model):
        slots = (slot for slots in own.slots.values() for slot in slots)
        if any(module_at(model, slot.rpartition(".")[0]) is module for slot in slots):
            yield name


vocabulary_resizes.subscribe(refuse_resize)
