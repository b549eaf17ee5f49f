"""A model as it is now, to compare with while it trains: its adapters' values are kept, its base is shared.

    reference = Reference(model)
    optimizer.step()
    with reference.acting():
        model(...)  # computes what it computed before

Preference training and reinforcement learning measure how far the policy has gone from where it began. Where no
active adapter changes anything yet, that is the model with its adapters disabled, and nothing is kept.
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
    """What `model` computes when this is made.

    Args:
        model: with adapters. Its base is taken for frozen.

    Attributes:
        kept: copies of the active adapters' tensors by `ADAPTER.NAME`; None where the reference is the base itself.

    Raises:
        PeftcoreError: the adapters are merged or sharded, or each sample of a batch has one of its own.
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
                "cannot keep the adapters as a reference: they are sharded. "
                "Replicate them: peftcore.shard(model, adapters='replicate')"
            )
        self.kept: dict[str, Tensor] | None = None
        if ranks.is_sharded(model) or not all(changes_nothing(model, name) for name in self.active):
            self.kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """Within the block the model computes what it computed then. For forwards without gradients.

        Raises:
            PeftcoreError: other adapters are active now, or none acts (`disabled`).
        """
        if self.is_acting:
            yield self.model
            return
        state = engine.require_state(self.model)
        active = state.active
        if active != self.active:
            raise PeftcoreError(
                f"the reference was kept with the adapters {list(self.active)} active, now {list(active)} are. "
                f"First peftcore.activate(model, {list(self.active)})"
            )
        self.is_acting = True
        try:
            if self.kept is None:
                with engine.disabled(self.model):
                    yield self.model
            else:
                with state.lock.changing("let the reference act"):
                    self._exchange()
                    try:
                        yield self.model
                    finally:
                        self._exchange()
        finally:
            self.is_acting = False

    def holds(self, tensor: Tensor) -> bool:
        """Has this a value of its own for `tensor` of the model?"""
        return any(tensor is own for _, own in self._tensors())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it to `reference.safetensors` in `folder`, from where a run that goes on takes it again."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in (self.kept or {}).items()}
        save_file(tensors, Path(folder) / FILE, {_IS_BASE: str(self.kept is None)})

    def restore(self, folder: str | os.PathLike[str]) -> bool:
        """Take what `save` wrote. Was it something else?

        Raises:
            CheckpointError: it is not there, or of other adapters.
        """
        before = self.kept
        try:
            with safe_open(Path(folder) / FILE, "pt") as file:
                is_base = (file.metadata() or {}).get(_IS_BASE) == "True"
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"'{folder}' says nothing of the model that the run compares with ({error}): it was written by a run "
                f"without one, or by an older version. Begin anew from its adapter: peftcore.load(model, '{folder}')"
            ) from error
        if is_base:
            self.kept = None
            return before is not None
        own = dict(self._tensors())
        wrong = sorted(own.keys() ^ found.keys()) or [n for n in own if own[n].shape != found[n].shape]
        if wrong:
            raise CheckpointError(f"'{Path(folder) / FILE}' is of other adapters, for example at '{wrong[0]}'")
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
        """Let each tensor hold what is kept of it, and the kept one what it held."""
        values = self.kept or {}
        for name, tensor in self._tensors():
            kept = values[name]
            tensor.data, kept.data = kept.data.to(tensor.device), tensor.data
