"""Combiners: adapters that call others of their module as branches (`Placement.branches`).

While a combiner is active, so are its branches, but only through it. Applying a combiner freezes its branches;
`set_trainable` lets them train with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from peftcore.adaptation.adapted import adapters_of
from peftcore.engine.state import State
from peftcore.engine.trained import TrainedParameters
from peftcore.errors import PeftcoreError
from peftcore.placements.attachments import Attached


def check_branches(model: nn.Module, state: State, adapter: str, attached: Iterable[Attached]) -> None:
    """Raise a PeftcoreError unless each branch of the new `adapter` is attached where it is to be combined."""
    for each in attached:
        for name in each.branches:
            if name == adapter:
                raise PeftcoreError(f"'{adapter}' names itself among the adapters that it combines")
            if name not in state.applied:
                there = f"applied: {', '.join(state.applied)}" if state.applied else "none is applied"
                raise PeftcoreError(
                    f"'{adapter}' combines '{name}', which is not applied ({there}). Apply or load it first: "
                    f"peftcore.load(model, folder, adapter='{name}')"
                )
            entry, own = state.applied[name], TrainedParameters.of(model, name)
            why = f"combines others itself ({', '.join(entry.branches)})" if entry.branches else None
            if entry.trained or (own is not None and own.has_moved(model)):
                why = "trains parameters of the base, which cannot be a branch of a call"
            if why:
                raise PeftcoreError(f"'{adapter}' cannot combine '{name}' ({entry.method}): it {why}")
            if name not in (adapters_of(model.get_submodule(each.path)) or ()):
                raise PeftcoreError(
                    f"'{adapter}' combines '{name}' at '{each.path}', where '{name}' ({entry.method}) is not "
                    f"attached. It is attached to {', '.join(map(repr, entry.paths[:3]))}"
                )


def freeze_branches(state: State, adapter: str) -> None:
    """Freeze the adapters that `adapter` combines, until it is removed or `set_trainable` is called."""
    for name in state.applied[adapter].branches:
        if state.applied[name].trainable:
            state.applied[name].trainable = False
            state.applied[adapter].froze.add(name)


def release_branches(state: State, adapter: str) -> None:
    """Make the branches trainable again that `adapter` froze."""
    for name in state.applied[adapter].froze & state.applied.keys():
        state.applied[name].trainable = True


def with_branches(state: State, names: Sequence[str]) -> tuple[str, ...]:
    """Return `names` with the branches of each combiner before it, unless they are named themselves."""
    every = (each for name in names for each in (*(b for b in state.applied[name].branches if b not in names), name))
    return tuple(dict.fromkeys(every))


def combined(state: State, names: Sequence[str]) -> set[str]:
    """Return the branches of the combiners among the active `names`, which are not active by themselves."""
    return {branch for name in names for branch in state.applied[name].branches}


def refuse_needed(state: State, adapter: str) -> None:
    """Raise a PeftcoreError if another adapter combines this one, which is to be removed."""
    combiner = next((name for name, entry in state.applied.items() if adapter in entry.branches), None)
    if combiner is not None:
        raise PeftcoreError(
            f"cannot remove '{adapter}': '{combiner}' combines it. First peftcore.remove(model, '{combiner}')"
        )
