"""A reference model that shares the base, for trainers that compare a model with its initial state (TRL's DPOTrainer).

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
    """Return a frozen reference for `model` that shares its weights and is called like the model.

    If the active adapters do not change the output yet, the reference is the model with adapters disabled. Otherwise
    the reference keeps a copy of the adapters' values and uses it during its calls.

    Args:
        model: a model with adapters, in its state before training.
        base: use the model without adapters as the reference, even if they already change its output.

    Raises:
        PeftcoreError: the model has no adapters, they are merged or sharded, or activation is per sample.

    Examples:
        >>> reference = peftcore.reference_model(model)    # before training
        >>> with torch.no_grad():
        ...     reference_logits = reference(input_ids=tokens).logits
    """
    return ReferenceModel(model, base=base)


class ReferenceModel(nn.Module):
    """Reference made by `reference_model`: it calls `policy` with its initial adapter values, without gradients.

    Attributes:
        policy: the model being trained.
        copies: {`ADAPTER.NAME`: copy of a tensor} for the active adapters; None if the reference is the base.
    """

    policy: nn.Module

    def __init__(self, policy: nn.Module, *, base: bool = False) -> None:
        super().__init__()
        state = engine.require_state(policy)
        engine.refuse_merged(state, "keep the model as a reference")
        engine.refuse_per_sample(state, "keep the model as a reference")
        engine.refuse_changed(policy)
        # Not registered as a submodule, since trainers would list, move and save its parameters a second time.
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
                "cannot keep a reference of sharded adapters. Replicate the adapters: peftcore.shard(model, "
                "adapter_placement='replicate')"
            )
        if sharded.is_sharded(policy) or not all(changes_nothing(policy, name) for name in self.active):
            self.copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `policy` returns."""
        return self.policy(*args, **kwargs)

    # In `__call__` rather than `forward`, since TRL replaces the reference's `forward` by one that calls submodules.
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
                f"'{name}' of a reference model is only available during a call of the reference, since it shares "
                "its modules with the trained model. Call the reference itself"
            )
        return value

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return copies of the reference's values and of its adapters' configs, for trainers that hash a state dict."""
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
            for name, buffer in trained.untrained_values(self.policy) if trained is not None else ():
                yield f"{adapter}.{name}", buffer

    def _exchange(self) -> None:
        """Exchange the values of the model's tensors and the copies."""
        copies = self.copies or {}
        for name, tensor in self._tensors():
            copy = copies[name]
            tensor.data, copy.data = copy.data.to(tensor.device), tensor.data
