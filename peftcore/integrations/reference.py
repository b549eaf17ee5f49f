"""A frozen reference of a model that trains: the adapters' values are kept, the base is shared.

    reference = Reference(model)
    optimizer.step()
    with reference.activated():
        model(...)  # computes what it computed before

Preference optimization and reinforcement learning measure how far the policy has moved from its start. If no active
adapter changes anything yet, the reference is the model with adapters disabled, and nothing is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore import engine, ranks
from peftcore.engine.trained import TrainedParameters
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.merging.merged_layers import changes_nothing

FILE = "reference.safetensors"
_IS_BASE = "peftcore_reference_is_base"


class Reference:
    """The function that `model` computes at construction.

    Args:
        model: a model with adapters. Its base must be frozen.

    Attributes:
        kept: copies of the active adapters' tensors by `ADAPTER.NAME`; None if the reference is the base.

    Raises:
        PeftcoreError: the adapters are merged or sharded, or each sample of a batch has its own.
    """

    def __init__(self, model: nn.Module) -> None:
        state = engine.require_state(model)
        engine.refuse_merged(state, "keep the model as a reference")
        engine.refuse_per_sample(state, "keep the model as a reference")
        engine.refuse_changed(model)
        self.model = model
        self.active = state.active
        self.is_acting = False
        tensors = dict(self._tensors())
        if any(map(ranks.is_part, tensors.values())):
            raise PeftcoreError(
                "adapters cannot be kept as a reference because they are sharded. Replicate them: "
                "peftcore.shard(model, adapter_placement='replicate')"
            )
        self.kept: dict[str, Tensor] | None = None
        if ranks.is_sharded(model) or not all(changes_nothing(model, name) for name in self.active):
            self.kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        """Make the model compute the reference within the block, for forward passes without gradients.

        Raises:
            PeftcoreError: other adapters are active now, or adapters are `disabled`.
        """
        if self.is_acting:
            yield self.model
            return
        state = engine.require_state(self.model)
        active = state.active
        if active != self.active:
            raise PeftcoreError(
                f"the reference was made with adapters {list(self.active)} active, but {list(active)} are active "
                f"now. Call peftcore.activate(model, {list(self.active)}) first"
            )
        self.is_acting = True
        try:
            if self.kept is None:
                with engine.disabled(self.model):
                    yield self.model
            else:
                with state.lock.changing("use the reference"):
                    self._exchange()
                    try:
                        yield self.model
                    finally:
                        self._exchange()
        finally:
            self.is_acting = False

    def holds(self, tensor: Tensor) -> bool:
        """Return whether the reference has its own value for `tensor` of the model."""
        return any(tensor is own for _, own in self._tensors())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the reference to `reference.safetensors` in `folder`, for `restore` by a resumed run."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in (self.kept or {}).items()}
        save_file(tensors, Path(folder) / FILE, {_IS_BASE: str(self.kept is None)})

    def restore(self, folder: str | os.PathLike[str]) -> bool:
        """Load what `save` wrote. Return whether it differed.

        Raises:
            CheckpointError: the file is missing, or belongs to other adapters.
        """
        before = self.kept
        try:
            with safe_open(Path(folder) / FILE, "pt") as file:
                is_base = (file.metadata() or {}).get(_IS_BASE) == "True"
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"'{folder}' has no reference model ({error}): it was written by a run without one, or by an "
                f"older version. Start a new run from its adapter: peftcore.load(model, '{folder}')"
            ) from error
        if is_base:
            self.kept = None
            return before is not None
        own = dict(self._tensors())
        wrong = sorted(own.keys() ^ found.keys()) or [n for n in own if own[n].shape != found[n].shape]
        if wrong:
            raise CheckpointError(f"'{Path(folder) / FILE}' belongs to other adapters, for example at '{wrong[0]}'")
        self.kept = {name: value.to(own[name].device, own[name].dtype) for name, value in found.items()}
        return before is None or any(not torch.equal(before[name], value) for name, value in self.kept.items())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for adapter in self.active:
            for name, parameter in engine.adapter_parameters(self.model, adapter):
                yield f"{adapter}.{name}", parameter
            for path, module in engine.adapter_modules(self.model, adapter):
                for name, buffer in module.named_buffers():
                    yield f"{adapter}.{path}.{name}", buffer
            own = TrainedParameters.of(self.model, adapter)
            for name, buffer in own.kept_values(self.model) if own is not None else ():
                yield f"{adapter}.{name}", buffer

    def _exchange(self) -> None:
        """Swap the values of the model's tensors with the kept ones."""
        values = self.kept or {}
        for name, tensor in self._tensors():
            kept = values[name]
            tensor.data, kept.data = kept.data.to(tensor.device), tensor.data
