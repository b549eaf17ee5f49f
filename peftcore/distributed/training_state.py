"""Adapters and optimizer state for `torch.distributed.checkpoint` (DCP), on any number of ranks.

dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)
dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from peftcore.engine import adapter_parameters, require_state, state_of
from peftcore.engine.trained_parameters import TrainedParameters, base_tensors
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.files.fingerprint import difference, fingerprint
from peftcore.files.tensors import trained_names
from peftcore.plugin import sharded
from peftcore.plugin.registry import registry


class TrainingState(Stateful):
    """State needed to resume training: the values of the adapters and the state of the optimizer. Collective.

    Args:
        model: a model with adapters; sharded, wrapped in DDP, or plain.
        optimizer: the optimizer of the model's trainable parameters.
        others: further objects with `state_dict` and `load_state_dict`, such as `scheduler=...`.

    Raises:
        CheckpointError: at load, if the checkpoint was saved on another base; nothing is changed.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, **others: Any) -> None:
        self.model = getattr(model, "module", model) if state_of(model) is None else model
        self.optimizer, self.others = optimizer, others
        if state_of(self.model) is None:
            raise PeftcoreError("no adapter is applied to this model. Try: peftcore.apply(model, 'METHOD')")
        methods = [entry.method for entry in require_state(self.model).applied.values()]
        growing = [method for method in methods if registry.method(method).trained_fields]
        if growing:
            raise PeftcoreError(
                f"adapters of {growing[0]} grow in training, but torch.distributed.checkpoint only loads tensors "
                "whose shapes have not changed. Train with Trainer, which saves and restores such adapters, or save "
                "the adapter with peftcore.save and the optimizer with torch.distributed.checkpoint.state_dict"
            )
        if any(map(sharded.is_zero3, self.model.parameters())):
            raise PeftcoreError(
                "the model is partitioned by DeepSpeed's ZeRO-3, which manages the optimizer's state itself. Save "
                "the optimizer with DeepSpeed's engine.save_checkpoint(folder), and the adapter with "
                "peftcore.save(model, folder)"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the adapters by name, the optimizer state by parameter name, and the base's fingerprint."""
        sharded.reshard(self.model)
        return {
            # Return copies, since loading fills the tensors in place before anything is checked.
            "adapters": {name: parameter.detach().clone() for name, parameter in self._adapters()},
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "base": fingerprint(self._base()),
            **{name: stateful.state_dict() for name, stateful in self.others.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the values that `dcp.load` has read."""
        problem = difference(self._base(), state_dict["base"])
        if problem:
            raise CheckpointError(f"the checkpoint was saved on another base: {problem}")
        with torch.no_grad():
            for name, parameter in self._adapters():
                parameter.copy_(state_dict["adapters"][name])
        set_optimizer_state_dict(self.model, self.optimizer, state_dict["optimizer"])
        for name, stateful in self.others.items():
            stateful.load_state_dict(state_dict[name])

    def _adapters(self) -> Iterator[tuple[str, Tensor]]:
        for adapter in require_state(self.model).applied:
            for name, parameter in adapter_parameters(self.model, adapter):
                yield f"{adapter}.{name}", parameter
            trained_parameters = TrainedParameters.of(self.model, adapter)
            for name, tensor in trained_parameters.untrained_values(self.model) if trained_parameters else ():
                yield f"{adapter}.{name}", tensor

    def _base(self) -> dict[str, Tensor]:
        names: set[str] = set()
        for adapter in require_state(self.model).applied:
            names |= trained_names(self.model, adapter)
        return {name: value for name, value in base_tensors(self.model).items() if name not in names}
