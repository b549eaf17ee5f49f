"""Model on one of several ranks of DeepSpeed's ZeRO: what is partitioned, and the buffers that DeepSpeed adds.

    ZeRO-1    optimizer states and fp32 copies of trained parameters: 1/ranks
    ZeRO-2    gradients after their reduction, too
    ZeRO-3    all parameters, too; those up to `stage3_param_persistence_threshold` elements stay whole as well

ZeRO-3 gathers the parameters of a module before its forward, and again before its backward (`deepspeed/runtime/zero`:
`partition_parameters.py`, `partitioned_param_coordinator.py`, `stage3.py` and `stage_1_and_2.py` of DeepSpeed 0.19).
From the second step on it knows the order of the modules:

    prefetch    the next parameters, as many as fit into `stage3_prefetch_bucket_size`, in one message that stays until
                the last of them is used, and is copied to each
    release     after a module, unless its parameters are used again within `stage3_max_reuse_distance` elements

So a model with fewer parameters than half of that distance, 10^9 by default, is whole from forward to backward.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from peftcore.estimating.following import Following
from peftcore.estimating.processes import GATHERED, GRADIENTS, MESSAGES, STATE, Alone
from peftcore.estimating.zero_settings import Zero


class _Engine(Alone):
    """What the stages share: one flat fp32 copy of this rank's part, and a bucket for gradients."""

    def __init__(self, model: nn.Module, zero: Zero, ranks: int) -> None:
        super().__init__(model)
        self.zero, self.ranks = zero.filled(model), ranks
        self.adapted = [p for p in model.parameters() if p.requires_grad]
        self.dtype = self.adapted[0].dtype
        self.nothing = torch.empty((), device="meta")
        self.filled = 0  # elements of the bucket in use

    def new(self, count: int, kind: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of so many elements, by default of the trained parameters' dtype."""
        made = self.nothing.new_empty(count, dtype=dtype or self.dtype)
        self.following.see(made, kind)
        return made

    def make_master(self, count: int) -> None:
        self.master = nn.Parameter(self.nothing.new_empty(count, dtype=torch.float32))

    def trained(self) -> list[nn.Parameter]:
        return [self.master]

    def start(self, following: Following) -> None:
        self.following = following
        following.see(self.master, STATE)

    def finish(self) -> None:
        gradient = self.new(self.master.numel(), GRADIENTS, torch.float32)
        self.master.grad = gradient


class Replicated(_Engine):
    """ZeRO-1 or ZeRO-2: whole parameters, of which this rank's optimizer has the first part."""

    def __init__(self, model: nn.Module, zero: Zero, ranks: int) -> None:
        super().__init__(model, zero, ranks)
        total = sum(p.numel() for p in self.adapted)
        part = 2 * -(-total // (2 * ranks))
        self.padding = part * ranks - total
        self.make_master(part)
        sizes = [p.numel() for p in self.adapted]
        self.own = {p for n, p in enumerate(self.adapted) if sum(sizes[:n]) < part}  # of which this rank has elements
        self.buffers: list[Tensor] = []
        self.pending: list[nn.Parameter] = []  # parameters whose gradients are in the bucket
        self.part: Tensor | None = None  # gradients of `own`
        self.kept: list[Tensor] = []  # the same, of batches before

    def start(self, following: Following) -> None:
        super().start(following)
        self.flat_end = self.new(self.padding, STATE)
        for p in self.adapted:
            p.register_post_accumulate_grad_hook(self._reduce if self.zero.stage == 2 else self._make_buffers)

    def after_backward(self) -> None:
        if self.zero.stage == 2:
            self._flush()
            self.buffers.clear()
            if self.part is not None and not self.kept:
                self.kept.append(self.part)  # later batches are added to it
            self.part = None

    def finish(self) -> None:
        if self.zero.stage == 1:
            for p in self.adapted:
                if p.grad is not None:
                    self._reduce(p)
            self._flush()
            self.kept = [] if self.part is None else [self.part]
        self.buffers.clear()
        flat = self.new(self.master.numel(), GRADIENTS)
        if self.dtype == torch.float32:
            self.master.grad = flat
        else:
            super().finish()
        self.kept.clear()
        self.part = None

    def _reduce(self, p: nn.Parameter) -> None:
        self._make_buffers(p)
        if self.filled + p.numel() > (self.zero.reduce_bucket_size or 0):
            self._flush()
        self.pending.append(p)
        self.filled += p.numel()
        if p.numel() <= (self.zero.reduce_bucket_size or 0):
            p.grad = None  # it is in the bucket

    def _make_buffers(self, p: nn.Parameter) -> None:
        if p.grad is not None:
            self.following.see(p.grad, GRADIENTS)
        if not self.buffers:
            count = 2 if self.zero.overlap_comm else 1
            self.buffers = [self.new(self.zero.reduce_bucket_size or 0, MESSAGES) for _ in range(count)]

    def _flush(self) -> None:
        if not self.pending:
            return
        message = self.new(self.filled, MESSAGES)
        del message
        if self.part is None and any(p in self.own for p in self.pending):
            self.part = self.new(sum(p.numel() for p in self.own), GRADIENTS)
        for p in self.pending:
            p.grad = None
        self.pending.clear()
        self.filled = 0


class _Message:
    """Parameters that are on their way in one message, of which each gets a copy when the first is needed."""

    def __init__(self, parameters: list[nn.Parameter], tensor: Tensor | None) -> None:
        self.parameters, self.tensor, self.arrived = parameters, tensor, tensor is None


class Partitions(_Engine):
    """ZeRO-3."""

    def __init__(self, model: nn.Module, zero: Zero, ranks: int) -> None:
        super().__init__(model, zero, ranks)
        for p in model.parameters():
            part = self.nothing.new_empty(-(-p.numel() // ranks), dtype=p.dtype)
            self.shards[p] = nn.Parameter(part, requires_grad=False)
        self.number = {p: n for n, p in enumerate(model.parameters())}
        self.make_master(sum(self.shards[p].numel() for p in self.adapted))
        most = self.zero.stage3_param_persistence_threshold or 0
        self.persistent = {p for p in model.parameters() if p.numel() <= most}
        self.order: list[nn.Module] = []  # modules in the order of their forwards and backwards
        self.is_known = False
        self.pending: list[nn.Parameter] = []
        self._begin()
        self.whole: set[nn.Parameter] = set()
        self.users: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
        self.coming: dict[nn.Parameter, _Message] = {}
        self.backwards: dict[nn.Module, int] = {}  # modules whose backward runs

    def rehearse(self, once: Callable[[], None]) -> None:
        hooks = [hook for module in self.model.modules() for hook in self._hook(module)]
        once()
        for p in self.adapted:
            p.grad = None
        self.is_known = True
        self.hooks = hooks  # these stay for the step

    def start(self, following: Following) -> None:
        super().start(following)
        self.gradients = self.new(self.master.numel(), GRADIENTS)
        self.bucket = self.new(self.zero.reduce_bucket_size or 0, MESSAGES)
        for p in self.persistent:
            following.see(p, GATHERED)
        self.whole = {*self.persistent}
        for p in self.adapted:
            p.register_post_accumulate_grad_hook(self._reduce)

    def after_backward(self) -> None:
        self._flush()
        while self.backwards:
            self._release(self.backwards.popitem()[0], forward=False)

    def finish(self) -> None:
        for p in [*self.whole]:
            self._free(p)
        if self.dtype == torch.float32:
            super().finish()
        else:
            flat = self.new(self.master.numel(), GRADIENTS)
            super().finish()
            del flat

    def _reduce(self, p: nn.Parameter) -> None:
        gradient = p.grad
        assert gradient is not None
        self.following.see(gradient, GRADIENTS)
        most = self.zero.reduce_bucket_size or 0
        if self.filled + p.numel() > most:
            self._flush()
        self.pending.append(p)
        self.filled += p.numel()
        if self.filled <= most:
            p.grad = None  # it is in the bucket

    def _flush(self) -> None:
        if self.pending:
            message = self.new(sum(self.ranks * self.shards[p].numel() for p in self.pending), MESSAGES)
            del message
            for p in self.pending:
                p.grad = None
        self.pending.clear()
        self.filled = 0

    # Order of the modules

    def _hook(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._before_forward, prepend=True),
            module.register_forward_hook(self._after_forward),
        ]

    def _begin(self) -> None:
        self.at = 0
        self.queue: deque[tuple[nn.Parameter, int]] = deque()
        self.fetched_for: dict[nn.Parameter, int] = defaultdict(lambda: -1)
        self.live = 0
        if self.is_known:
            own = ((p, n) for n, module in enumerate(self.order) for p in self._of(module))
            self.queue.extend(own)

    def _of(self, module: nn.Module) -> list[nn.Parameter]:
        return sorted({p for p in module._parameters.values() if p is not None}, key=self.number.__getitem__)

    def _before_forward(self, module: nn.Module, args: Any) -> Any:
        if module is self.model:
            self._begin()
        self._fetch(module, forward=True)
        leaves, form = tree_flatten(args)
        at = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not at or not torch.is_grad_enabled():
            return None
        passed = _Ends.apply(self, module, *(leaves[n] for n in at))  # type: ignore[no-untyped-call]
        for n, tensor in zip(at, passed, strict=True):
            leaves[n] = tensor
        return tree_unflatten(leaves, form)

    def _after_forward(self, module: nn.Module, args: Any, outputs: Any) -> None:
        self._release(module, forward=True)
        for leaf in tree_flatten(outputs)[0]:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: self._fetch(module, forward=False))

    def end_backward(self, module: nn.Module) -> None:
        """Free a module's parameters after its backward."""
        self._release(module, forward=False)

    # Parameters

    def _fetch(self, module: nn.Module, *, forward: bool) -> None:
        if not self.is_known:
            self.order.append(module)
            return
        if not forward:
            self.backwards[module] = self.at
        own = self._of(module)
        self._gather(own)
        for p in own:
            self.users[p].add(module)
            message = self.coming.pop(p, None)
            if message is not None and not message.arrived:
                for each in message.parameters:
                    self.following.see(each, GATHERED)
                message.arrived = True
        new = [p for p in own if self.fetched_for[p] < self.at]
        for _ in new:
            if self.queue:
                p, at = self.queue.popleft()
                self.fetched_for[p] = at
        self._prefetch()
        self.at += 1

    def _prefetch(self) -> None:
        zero = self.zero
        most = min(zero.stage3_max_live_parameters - self.live, zero.stage3_prefetch_bucket_size or 0)
        ahead: dict[nn.Parameter, None] = {}
        while self.queue and sum(p.numel() for p in ahead) < most:
            p, at = self.queue.popleft()
            self.fetched_for[p] = max(self.fetched_for[p], at)
            if p not in self.whole and p not in ahead:
                ahead[p] = None
        self._gather(ahead)

    def _gather(self, parameters: Iterable[nn.Parameter]) -> None:
        missing = [p for p in parameters if p not in self.whole]
        if not missing or self.ranks == 1:
            return
        self.live += sum(p.numel() for p in missing)
        self.whole.update(missing)
        size = sum(self.ranks * self.shards[p].nbytes for p in missing)
        self.following.pass_by("c10d::_allgather_base_", size)
        message = None
        if len(missing) == 1:
            self.following.see(missing[0], GATHERED)
        else:
            message = self.nothing.new_empty(size, dtype=torch.uint8)
            self.following.see(message, MESSAGES)
        found = _Message(missing, message)
        self.coming.update(dict.fromkeys(missing, found))

    def _release(self, module: nn.Module, *, forward: bool) -> None:
        if not self.is_known:
            return
        if not forward:
            self.backwards.pop(module, None)
        own = self._of(module)
        free = {p for p in own if p not in self.persistent and self.fetched_for[p] <= self.at}
        distance = 0
        for other in self.order[self.at :] if free else ():
            if distance >= self.zero.stage3_max_reuse_distance:
                break
            for p in self._of(other):
                free.discard(p)
                distance += p.numel()
        for p in own:
            self.users[p].discard(module)
            if p in free and p in self.whole and p not in self.coming and not self.users[p]:
                self._free(p)

    def _free(self, p: nn.Parameter) -> None:
        message = self.coming.pop(p, None)
        if message is None or message.arrived or message.tensor is None:
            self.following.release(p)
        self.whole.discard(p)
        self.live -= p.numel()


class _Ends(torch.autograd.Function):
    """Identity that tells the partitions when a module's backward has ended."""

    @staticmethod
    def forward(ctx: Any, run: Partitions, module: nn.Module, *tensors: Tensor) -> Any:
        ctx.run, ctx.module = run, module
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.run.end_backward(ctx.module)
        return None, None, *gradients
