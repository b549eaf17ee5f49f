"""Refusals of models under tensor or pipeline parallelism."""

from __future__ import annotations

from torch import nn

from peftcore import ranks
from peftcore.adaptation.adapted import base_modules
from peftcore.engine.placing import Placed
from peftcore.errors import PeftcoreError


def refuse_stage(model: nn.Module) -> None:
    """Raise a PeftcoreError if this rank has only a pipeline stage of the model."""
    if getattr(model, "_pp_stage", None) is not None:  # of transformers, for pp_size > 1
        raise PeftcoreError(
            "the model is divided into stages of a pipeline (pp_size), and this rank has only some of its layers: an "
            "adapter would cover these alone, and no gradient crosses the stages. Load the model without pp_size, "
            "apply, and call peftcore.shard(model), or load it with peftcore.load_sharded(folder)"
        )


def refuse_divided(model: nn.Module, placed: Placed) -> None:
    """Raise a PeftcoreError if tensor parallelism splits a layer that an adapter would change.

    Other layers, and their gradients, are whole on every rank.
    """
    if not ranks.is_sharded(model):
        return
    paths = {id(module): path for path, module in base_modules(model)}
    divided = {
        f"{paths[id(module)]}.{name}".removeprefix("."): parameter
        for fsdp, module in ranks.enclosed(model)
        for name, parameter in module._parameters.items()
        if id(module) in paths and parameter is not None and ranks.is_divided(parameter, fsdp=fsdp)
    }
    if not divided:
        return
    for each in placed.attached:
        own = [f"{each.path}.{name}".removeprefix(".") for name in submodule_parameters(model, each.path)]
        needed = (placement.divided(each.path, own, divided) for placement in each.placements)
        found = next(filter(None, needed), None)
        if found is not None:
            raise PeftcoreError(
                f"{placed.method.name} cannot be applied: tensor parallelism (tp_plan, tp_size) divides '{found}' over "
                "the ranks, and the adapter needs all outputs or inputs of the layer. Load the model without tp_plan, "
                "apply, and call peftcore.shard(model), or load it by peftcore.load_sharded(folder)"
            )


def submodule_parameters(model: nn.Module, path: str) -> list[str]:
    """Return the names of the own parameters of the module at `path`."""
    return [name for name, parameter in model.get_submodule(path)._parameters.items() if parameter is not None]
