"""`Train` placements: the adapter has a copy of its own of a base parameter, and the two change places.

The module's slot holds the adapter's copy while the adapter is active and the base's parameter while
it rests; this module holds the other one. Keys of the base stay, several adapters may own one
parameter in turn, and removing restores the very same `nn.Parameter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from peftcore import ranks
from peftcore.adapted import TRAINED, Adapters, base_parameters
from peftcore.errors import PeftcoreError


class TrainedParameters(nn.Module):
    """The parameters that one adapter trains. `slots`: per name, all slots that share the parameter (tied weights)."""

    def __init__(self, slots: dict[str, list[str]]) -> None:
        super().__init__()
        self.slots = slots
        self.active = False

    @staticmethod
    def attach(model: nn.Module, adapter: str, names: Iterable[str]) -> None:
        """Give `model` resting copies of the parameters `names`; their values are the base's."""
        if TRAINED not in model._modules:
            model.add_module(TRAINED, Adapters().train(model.training))
        base = list(base_parameters(model))
        by_name = dict(base)
        slots: dict[str, list[str]] = {}
        taken: set[int] = set()
        for name in names:
            parameter = by_name[name]
            if ranks.is_part(parameter):
                raise PeftcoreError(f"'{name}' is sharded and cannot be trained from here on. Apply first, then shard")
            if id(parameter) not in taken:  # a tied parameter, named twice, is one
                taken.add(id(parameter))
                slots[name] = [name, *(other for other, p in base if p is parameter and other != name)]
        trained = TrainedParameters(slots).train(model.training)
        for name in slots:
            trained._parameters[_key(name)] = nn.Parameter(by_name[name].detach().clone())
        model._modules[TRAINED]._modules[adapter] = trained

    @staticmethod
    def detach(model: nn.Module, adapter: str) -> None:
        """Forget a resting adapter's copies."""
        del model._modules[TRAINED]._modules[adapter]
        if not len(model._modules[TRAINED]):
            del model._modules[TRAINED]

    @staticmethod
    def of(model: nn.Module, adapter: str) -> TrainedParameters:
        """The parameters that `adapter` trains."""
        return model._modules[TRAINED][adapter]

    def activate(self, model: nn.Module, active: bool) -> None:
        """Put the adapter's parameters into the model, or the base's back."""
        if active == self.active:
            return
        if any(ranks.is_part(parameter) for _, parameter in self.originals(model)):
            ranks.refuse_sharded(model, "exchange trained parameters for those of the base")
        for name, slots in self.slots.items():
            key = _key(name)
            inside, aside = _slot(model, name), self._parameters[key]
            for slot in slots:
                module, attribute = _owner(model, slot)
                module._parameters[attribute] = aside
            self._parameters[key] = inside
        self.active = active

    def values(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, the adapter's parameter)."""
        for name in self.slots:
            yield name, _slot(model, name) if self.active else self._parameters[_key(name)]

    def originals(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, the base's parameter)."""
        for name in self.slots:
            yield name, self._parameters[_key(name)] if self.active else _slot(model, name)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a parameter's name must not contain a dot


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _slot(model: nn.Module, name: str) -> nn.Parameter:
    module, attribute = _owner(model, name)
    return module._parameters[attribute]
