"""A reference for trainers that compare a model with its start, such as TRL's DPOTrainer, without a second base.

reference = peftcore.reference_model(model)
DPOTrainer(model=model, ref_model=reference, ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.adaptation.modes import evaluation_mode
from peftcore.engine.merging.merged_layers import changes_nothing
from peftcore.engine.trained_parameters import TrainedParameters
from peftcore.errors import PeftcoreError
from peftcore.plugin import sharded


def reference_model(model: nn.Module, *, base: bool = False) -> ReferenceModel:
    """Return a frozen reference of `model`, which shares its weights: call it as you call the model.

    If the active adapters change nothing yet, the reference is the model with its adapters disabled. Otherwise it
    keeps a copy of the adapters' values and uses them during its calls.

    Args:
        model: a model with adapters, as it is before training.
        base: use the model without adapters as the reference, even if they already change its output.

    Raises:
        PeftcoreError: the model has no adapters, they are merged or sharded, or each sample of a batch has its own.
    """
    return ReferenceModel(model, base=base)


class ReferenceModel(nn.Module):
    """What `reference_model` returns: calls `policy` as it was, in evaluation mode and without gradients.

    Attributes:
        policy: the model that trains.
        copies: copies of the active adapters' tensors by `ADAPTER.NAME`; None if the reference is the base.
    """

    policy: nn.Module

    def __init__(self, policy: nn.Module, *, base: bool = False) -> None:
        super().__init__()
        state = engine.require_state(policy)
        engine.refuse_merged(state, "keep the model as a reference")
        engine.refuse_per_sample(state, "keep the model as a reference")
        engine.refuse_changed(policy)
        # Not a submodule: trainers would list, move and save its parameters a second time.
        self.__dict__["policy"] = policy
        self.active = state.active
        self.is_acting = False
        self.copies: dict[str, Tensor] | None = None
        self.eval()
        if base:
            return
        tensors = dict(self._tensors())
        if any(map(sharded.is_shard, tensors.values())):
            raise PeftcoreError(
                "adapters cannot be kept as a reference because they are sharded. Replicate them: "
                "peftcore.shard(model, adapter_placement='replicate')"
            )
        if sharded.is_sharded(policy) or not all(changes_nothing(policy, name) for name in self.active):
            self.copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `policy` returns."""
        return self.policy(*args, **kwargs)

    # Not in `forward`: TRL gives the reference another one, which calls parts of the model by itself.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self._acting(), evaluation_mode(self.policy):
            return super().__call__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if "policy" not in self.__dict__:
            raise AttributeError(name)
        value = getattr(self.policy, name)
        if not self.is_acting and (callable(value) or isinstance(value, Tensor)):
            raise AttributeError(
                f"'{name}' of a reference model is only available during its call; otherwise it would be that of the "
                "model that trains. Call the reference itself"
            )
        return value

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return copies of the reference's values and its adapters' configs, for trainers that hash them."""
        with torch.no_grad(), self._acting():
            tensors = {name: t.detach().clone() for name, t in self.policy.state_dict(*args, **kwargs).items()}
        applied = engine.require_state(self.policy).applied
        configs = repr([(name, applied[name].method, applied[name].config) for name in self.active])
        return {**tensors, "peftcore_configs": torch.tensor(list(configs.encode()), dtype=torch.uint8)}

    @contextmanager
    def _acting(self) -> Iterator[None]:
        state = engine.require_state(self.policy)
        if state.active != self.active:
            raise PeftcoreError(
                f"the reference was made with adapters {list(self.active)} active, but {list(state.active)} are active "
                f"now. Call peftcore.activate(model, {list(self.active)}) first"
            )
        self.is_acting = True
        try:
            if self.copies is None:
                with engine.disabled(self.policy):
                    yield
            else:
                with state.lock.changing("use the reference"):
                    self._exchange()
                    try:
                        yield
                    finally:
                        self._exchange()
        finally:
            self.is_acting = False

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for adapter in self.active:
            for name, parameter in engine.adapter_parameters(self.policy, adapter):
                yield f"{adapter}.{name}", parameter
            for path, module in engine.adapter_modules(self.policy, adapter):
                for name, buffer in module.named_buffers():
                    yield f"{adapter}.{path}.{name}", buffer
            trained = TrainedParameters.of(self.policy, adapter)
            for name, buffer in trained.kept_values(self.policy) if trained is not None else ():
                yield f"{adapter}.{name}", buffer

    def _exchange(self) -> None:
        """Swap the values of the model's tensors with the copies."""
        copies = self.copies or {}
        for name, tensor in self._tensors():
            copy = copies[name]
            tensor.data, copy.data = copy.data.to(tensor.device), tensor.data
