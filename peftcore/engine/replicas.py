"""Keep adapters equal on all ranks, and find the blocks in which a model is sharded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from torch import Tensor, nn

from peftcore.engine import adapter_modules, adapter_parameters, state_of
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.plugin import ranks


def broadcast_adapters(model: nn.Module) -> None:
    """Copy rank 0's adapters and their buffers to every rank, since their random initial values may differ.

    Collective.
    """
    state = state_of(model)
    tensors: list[Tensor] = []
    for name in state.applied if state is not None else ():
        tensors += [parameter for _, parameter in adapter_parameters(model, name)]
        for _, adapter in adapter_modules(model, name):
            tensors += adapter.buffers()
    ranks.broadcast(tensors)


def check_ranks(model: nn.Module) -> None:
    """Raise a PeftcoreError on every rank unless all ranks have the same model with the same adapters. Collective."""
    base = {id(p): (name, p) for name, p in base_parameters(model)}.values()
    facts = {"base": f"{type(model).__name__} with {_digest(base)}"}
    if (state := state_of(model)) is not None:
        for name, entry in state.applied.items():
            inactive = "" if name in state.active else ", inactive"
            facts[name] = f"{entry.method}, {entry.config}, {_digest(adapter_parameters(model, name))}{inactive}"
    ranks.check_equal(facts, "adapters")


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a model: the members of its outermost `ModuleList`s."""
    outer: list[str] = []
    for path, module in base_modules(model):
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer_path}.") for outer_path in outer):
            outer.append(path)
            yield from (block for block in module if any(True for _ in block.parameters()))


def between_blocks(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that several blocks share, such as shared adapters. `fully_shard` must not shard them."""
    counts = Counter(chain.from_iterable(block.parameters() for block in blocks(model)))
    return {parameter for parameter, count in counts.items() if count > 1}


def refuse_between_blocks(model: nn.Module) -> None:
    """Raise a PeftcoreError if blocks share a trained parameter, since blocks are sharded separately."""
    shared = {parameter for parameter in between_blocks(model) if parameter.requires_grad}
    state = state_of(model)
    for adapter, entry in state.applied.items() if state is not None else ():
        name = next((name for name, p in adapter_parameters(model, adapter) if p in shared), None)
        if name is not None:
            raise PeftcoreError(
                f"'{adapter}' ({entry.method}) trains '{name}' in several blocks, which accelerate's FSDP2 cannot "
                "shard. Leave fsdp out of the training arguments, and call peftcore.shard(model, "
                "adapter_placement='replicate') before creating the Trainer"
            )


def _digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Describe parameters by a hash of their names, shapes and dtypes: `12 tensors of 3,456 values (1a2b3c4d)`."""
    parameters = list(parameters)
    listing = "\n".join(f"{name} {list(p.shape)} {p.dtype}" for name, p in parameters)
    values = sum(p.numel() for _, p in parameters)
    return f"{len(parameters)} tensors of {values:,} values ({hashlib.sha256(listing.encode()).hexdigest()[:8]})"
