"""One process's shard of a distributed model, and the memory that DDP and FSDP2 add to its step.

DDP (torch.nn.parallel.DistributedDataParallel, Li et al. 2020, arXiv 2006.15704): a copy of all gradients, in buckets.
FSDP2 (`fully_shard`, as called by `peftcore.shard`): a shard of 1/ranks of each block. Before the block's forward, and
again before its backward, the whole block is all-gathered into one buffer and copied out to full weights:

    forward     gather block k | copy out | free message k-1 | compute | free the weights
    backward    gather block k, if it is missing | copy out | gather block k-1 | compute | free the weights |
                gradients into one message, of which this rank's part stays
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from peftcore.distributed import blocks, divided
from peftcore.estimating.following import Following
from peftcore.estimating.purpose import Purpose
from peftcore.estimating.step import Step
from peftcore.estimating.tensor_parallel import planned_groups
from peftcore.plugin import ranks


class Alone:
    """Model on one process; base class for distributed models.

    Attributes:
        shards: This rank's shard of each sharded parameter.
    """

    shards: dict[nn.Parameter, nn.Parameter]

    def __init__(self, model: nn.Module) -> None:
        self.model, self.shards = model, {}

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates."""
        return [self.shards.get(p, p) for p in self.model.parameters() if p.requires_grad]

    def start(self, following: Following) -> None:
        """Record the memory that exists in addition to the model when the run begins."""

    def after_forward(self, outputs: Any) -> Any:
        """Return the model's outputs as passed to the loss."""
        return outputs

    def after_backward(self) -> None:
        """Simulate the communication after a backward pass."""


class Replicas(Alone):
    """DDP.

    Args:
        clones: Whether DDP copies all outputs to find unused parameters, which Trainer enables without gradient
            checkpointing.
    """

    def __init__(self, model: nn.Module, clones: bool) -> None:
        super().__init__(model)
        self.clones = clones

    def start(self, following: Following) -> None:
        self.buckets = [p.new_empty(p.numel()) for p in self.trained()]
        for bucket in self.buckets:
            following.see(bucket, Purpose.MESSAGES)

    def after_forward(self, outputs: Any) -> Any:
        if not self.clones:
            return outputs
        return tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad else t, outputs)


class Shards(Alone):
    """FSDP2, with averaged gradients for adapters that are not sharded."""

    def __init__(self, model: nn.Module, step: Step, on_card: bool) -> None:
        super().__init__(model)
        self.on_card = on_card
        options = dict(step.shard) if isinstance(step.shard, Mapping) else {}
        self.ranks = step.copies
        reshards = options.get("reshard_after_forward", True)
        self.averaged, whole = divided(model, options.get("adapter_placement", "replicate"))
        self.nothing = torch.empty((), device="meta")
        self.last: Tensor | None = None  # buffer of the forward's last all-gather, freed by the next one
        self.reduced: list[Tensor] = []  # buffers of gradients in flight
        self.order: list[_Group] = []  # order in which the groups' forwards ended
        assigned: set[nn.Parameter] = set(whole)
        self.groups = []
        groups = planned_groups(model, step) if step.tp_size > 1 else [(m, reshards) for m in (*blocks(model), model)]
        for module, frees in groups:
            parameters = [p for p in dict.fromkeys(module.parameters()) if p not in assigned]
            assigned.update(parameters)
            if parameters:
                self.groups.append(_Group(self, module, parameters, frees))
        for group in self.groups:
            self.shards.update(group.shards)

    def start(self, following: Following) -> None:
        self.following = following
        for group in self.groups:
            group.hook()
        self.model.register_forward_hook(self._end_forward)

    def _end_forward(self, *_: Any) -> None:
        if not _in_backward():
            self.last = None

    def message(self, size: int) -> Tensor:
        """Return a communication buffer with this number of bytes."""
        buffer = self.nothing.new_empty(-(-size // 2), dtype=torch.bfloat16)
        self.following.see(buffer, Purpose.MESSAGES)
        return buffer

    def sent(self, name: str, size: int) -> None:
        """Record a communication between ranks. Gloo (on CPUs) holds a copy of the buffer during it; NCCL does not."""
        copy = None if self.on_card else self.message(size)
        self.following.pass_by(name)
        del copy

    def after_backward(self) -> None:
        for group in self.groups:
            group.after_backward()
            group.gathering = None
        self.order.clear()
        self.reduced.clear()
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for p in self.averaged:
            if p.requires_grad and p.grad is not None:
                by_dtype.setdefault(p.dtype, []).append(p)
        for parameters in by_dtype.values():
            message = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            self.following.see(message, Purpose.MESSAGES)


class _Group:
    """Parameters that are gathered together: the parameters of a block, or all parameters outside blocks."""

    def __init__(self, run: Shards, module: nn.Module, parameters: list[nn.Parameter], reshards: bool) -> None:
        self.run, self.module, self.parameters, self.reshards = run, module, parameters, reshards
        self.shards = {p: _shard(p, run.ranks) for p in parameters}
        self.size = run.ranks * sum(shard.nbytes for shard in self.shards.values())
        self.gathering: Tensor | None = None
        self.is_whole = self.is_in_backward = False

    def hook(self) -> None:
        """Install hooks that gather and free the module's weights."""
        self.module.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        self.module.register_forward_hook(self._after_forward, always_call=False)

    def gather(self) -> None:
        if self.gathering is None and not self.is_whole and self.run.ranks > 1:
            self.gathering = self.run.message(self.size)
            self.run.sent("c10d::_allgather_base_", self.size)

    def copy_out(self, *, forward: bool) -> None:
        if self.is_whole:
            return
        if forward:
            self.run.last = None
        for p in self.parameters:
            self.run.following.see(p, Purpose.GATHERED)
        self.run.following.pass_by("fsdp::split_with_sizes_copy")
        if forward:
            self.run.last = self.gathering
        self.gathering, self.is_whole = None, True

    def give_back(self) -> None:
        if self.is_whole:
            for p in self.parameters:
                self.run.following.release(p)
        self.is_whole = False

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.gather()
        self.copy_out(forward=not self.is_in_backward)
        if self.is_in_backward or not torch.is_grad_enabled():
            return args, kwargs
        leaves, form = tree_flatten((args, kwargs))
        at = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if at:
            outputs = _AfterBackward.apply(self, *(leaves[n] for n in at))  # type: ignore[no-untyped-call]
            for n, tensor in zip(at, outputs, strict=True):
                leaves[n] = tensor
        return tree_unflatten(leaves, form)

    def _after_forward(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if self.is_in_backward:
            return
        if not _in_backward():
            if self.reshards:
                self.give_back()
            self.run.order.append(self)
        for leaf in tree_flatten(outputs)[0]:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._before_backward)

    def _before_backward(self, _: Tensor) -> None:
        if self.is_in_backward:
            return
        self.is_in_backward = True
        self.gather()
        self.copy_out(forward=False)
        order = self.run.order
        if self in order:
            at = len(order) - 1 - order[::-1].index(self)
            del order[at]
            if at > 0:
                order[at - 1].gather()

    def after_backward(self) -> None:
        """Free the block's weights once its gradients are complete, and keep this rank's shard of the gradients."""
        self.is_in_backward = False
        trainable = [p for p in self.parameters if p.grad is not None]
        if not trainable:
            return self.give_back()
        gradients = [p.grad for p in trainable]
        for p in trainable:
            p.grad = None
        self.give_back()
        self.run.reduced.clear()
        size = sum(self.shards[p].nbytes for p in trainable)
        self.run.reduced.append(self.run.message(self.run.ranks * size))
        gradients.clear()
        dtype = trainable[0].dtype
        part = self.run.nothing.new_empty(size // dtype.itemsize, dtype=dtype)
        self.run.following.see(part, Purpose.GRADIENTS)
        offset = 0
        for p in trainable:
            shard = self.shards[p]
            local_tensor = part.narrow(0, offset, shard.numel()).view(shard.shape)
            offset += shard.numel()
            shard.grad = local_tensor if shard.grad is None else shard.grad.add_(local_tensor)
        return None


class _AfterBackward(torch.autograd.Function):
    """Identity function that notifies a group when its backward has ended."""

    @staticmethod
    def forward(ctx: Any, group: _Group, *tensors: Tensor) -> Any:
        ctx.group = group
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.group.after_backward()
        return None, *gradients


def _shard(p: nn.Parameter, count: int) -> nn.Parameter:
    """Return the first rank's shard along the first dimension, which is the largest shard."""
    local_tensor = ranks.local(p.detach())
    rows = -(-local_tensor.shape[0] // count) if local_tensor.dim() else 1
    return nn.Parameter(local_tensor.new_empty((rows, *local_tensor.shape[1:]), device="meta"), p.requires_grad)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
