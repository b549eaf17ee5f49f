"""A run without values, followed: every storage from when it is made until nothing holds it any more.

Floats are on the meta device and small integers real (`observation.meta`). Where PyTorch chooses between algorithms by
the device, the choice is the CPU's.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from peftcore.errors import PeftcoreError
from peftcore.estimating.costs import FREE, Cost, cost
from peftcore.estimating.libraries import Libraries
from peftcore.observation.meta import MetaFloats

MADE, GONE, TENSOR_MADE, VIEW_MADE, TENSOR_GONE = "made", "gone", "tensor made", "view made", "tensor gone"
NODE, SCRATCH, NODES_GONE, STEPS, AGAIN_GONE = "node", "scratch", "nodes gone", "steps", "nodes again gone"
_LOOKUPS = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather"}  # of what they read little is used
LARGEST_INDEX = 1 << 22  # integers with more values than this are not real


class NotFollowed(PeftcoreError):
    """A model, or a step of it, that does not run without values."""


@dataclass(slots=True)
class Storage:
    """Memory from operation `born` to operation `died`; None: it stays.

    Args:
        shape: of the first tensor that was seen in it.
        kind: what it is for, as far as that is known.
        module: path of the module in which it was made.
    """

    bytes: int
    shape: tuple[int, ...]
    born: int
    died: int | None = None
    kind: str | None = None
    module: str = ""


@dataclass(slots=True)
class Operation:
    """One operator.

    Args:
        name: its schema's.
        module: path of the module in whose forward it ran, or if none does of that whose results it read.
        phase: part of the step.
        moved: bytes that it reads and writes. elements: of the largest tensor among these.
        halves: does it compute in 16 bits?
        recomputed: in a forward that a backward runs again.
        times: it stands for so many, which are not followed one by one.
    """

    name: str
    module: str
    phase: str
    cost: Cost = FREE
    moved: int = 0
    halves: bool = False
    recomputed: bool = False
    elements: int = 0
    times: float = 1.0


class Event(NamedTuple):
    """What a process does with its heap, in the order in which it does it.

    Args:
        kind: a storage is `MADE` or `GONE`; so are a tensor's objects, those of a view being others; an operator gets a
            node of autograd (`NODE`) or takes memory of its own (`SCRATCH`); all nodes are given back (`NODES_GONE`),
            or those of a forward that a backward ran again (`AGAIN_GONE`); the optimizer `STEPS`.
        number: of the storage, the tensor or the operation.
        edges: of a node, the tensors that its operator takes; of a tensor, those of them that need a gradient.
        leaves: of a node, those tensors that are parameters and need one.
    """

    kind: str
    number: int = 0
    edges: int = 0
    leaves: int = 0


def births_and_deaths(storages: Sequence[Storage]) -> tuple[dict[int, list[int]], dict[int, list[int]], list[int]]:
    """By operation the numbers of the storages that it makes, and that are gone before it; and of those that stay."""
    born, died, stay = defaultdict(list), defaultdict(list), []
    for number, storage in enumerate(storages):
        if storage.born == 0 and storage.died is None:
            stay.append(number)
            continue
        born[storage.born].append(number)
        if storage.died is not None:
            died[storage.died].append(number)
    return born, died, stay


class Following:
    """Follows what is done within `with following.running(model):`. `libraries`: what is taken inside operators."""

    def __init__(self, libraries: Libraries) -> None:
        self.libraries = libraries
        self.storages: list[Storage] = []
        self.operations: list[Operation] = []
        self.events: list[Event] = []
        self.phase = ""
        self.times = 1.0  # how often what runs now does, of which it is followed once
        self._tensors = 0
        self._ended = False
        self._modules: list[str] = []  # those whose forward is running
        self._live: dict[int, Storage] = {}
        self._numbers: dict[int, int] = {}  # of those, in `storages`

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Within the block everything is followed, and known by the paths of `model`'s modules."""
        paths = {id(module): path for path, module in model.named_modules()}

        def enter(module: nn.Module, _: Any) -> None:
            if id(module) in paths:
                if not self._modules:
                    self._nodes_of_again_gone()  # of what the older kind of checkpointing has computed before
                self._modules.append(paths[id(module)])

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            if id(module) in paths and self._modules:
                self._modules.pop()
                if not self._modules and output is None:  # it was stopped when all was there that is needed
                    self._nodes_of_again_gone()

        for hook in (enter, leave):
            vars(hook)["only_looks"] = True  # for code that takes another way where a hook could change something

        with ExitStack() as stack:
            hooks = torch.nn.modules.module
            stack.callback(hooks.register_module_forward_pre_hook(enter).remove)
            stack.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)
            stack.enter_context(_attention_of_cpu())
            stack.enter_context(MetaFloats(self._record, LARGEST_INDEX))
            yield

    def _nodes_of_again_gone(self) -> None:
        if self.phase.startswith("backward"):
            self.events.append(Event(AGAIN_GONE))

    def see(self, tensor: Tensor, kind: str | None = None, *, only_new: bool = False) -> None:
        """Note the tensor's storage; with `kind`, what it is for, unless that is known and `only_new`."""
        if tensor.layout is not torch.strided:
            raise NotFollowed(f"a tensor of layout {tensor.layout} is made, whose memory is not followed")
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is None:
            module = self._modules[-1] if self._modules else ""
            known = Storage(storage.nbytes(), tuple(tensor.shape), len(self.operations), None, kind, module)
            self._live[key], self._numbers[key] = known, len(self.storages)
            self.events.append(Event(MADE, len(self.storages)))
            weakref.finalize(storage, self._gone, key, known, len(self.storages)).atexit = False
            self.storages.append(known)
        elif kind is not None and not (only_new and known.kind):
            known.kind = kind

    def release(self, tensor: Tensor) -> None:
        """Note that the tensor's memory is given back, though the tensor stays; `see` has it come again."""
        key = tensor.untyped_storage()._cdata
        self._gone(key, self._live[key], self._numbers[key])

    def pass_by(self, name: str, moved: int) -> None:
        """Note an operation that takes place on other memory than tensors': so many bytes are moved."""
        inside = self._modules[-1] if self._modules else ""
        self.operations.append(Operation(name, inside, self.phase, moved=moved))

    def note(self, kind: str) -> None:
        """Note what is done in between: `NODES_GONE` or `STEPS`."""
        self.events.append(Event(kind))

    def end(self) -> None:
        """Follow no more: what is there now stays, though the stand-in is about to go."""
        self._ended = True

    def _tensor_gone(self, number: int) -> None:
        if not self._ended:
            self.events.append(Event(TENSOR_GONE, number))

    def _gone(self, key: int, storage: Storage, number: int) -> None:
        if self._ended or storage.died is not None:
            return
        storage.died = len(self.operations)
        self.events.append(Event(GONE, number))
        if self._live.get(key) is storage:
            del self._live[key]

    def _record(self, operator: Any, args: tuple[Any, ...], tensors: list[Tensor], output: Any) -> None:
        inside = self._modules[-1] if self._modules else ""
        if not inside:
            for tensor in tensors:
                known = self._live.get(tensor.untyped_storage()._cdata)
                if known is not None and known.module:
                    inside = known.module
        again = bool(self._modules) and self.phase.startswith("backward")
        operation = Operation(operator._schema.name, inside, self.phase, recomputed=again, times=self.times)
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        is_forward = again or self.phase.startswith("forward")
        ours = operator.namespace == "peftcore" and is_forward  # within a Function's forward
        needing = [t for t in tensors if t.requires_grad] if torch.is_grad_enabled() or ours else []
        if needing:
            leaves = sum(t.is_leaf for t in needing)
            self.events.append(Event(NODE, len(self.operations), len(tensors), leaves))
        if not operator.is_view:
            touched = made if operation.name in _LOOKUPS else [*tensors, *made]
            operation.moved = sum(t.nbytes for t in touched)
            operation.elements = max((t.numel() for t in touched), default=0)
            operation.halves = any(t.dtype in (torch.float16, torch.bfloat16) for t in made)
            operation.cost = cost(operator, args, output, self.libraries)
            if operation.cost.scratch:
                self.events.append(Event(SCRATCH, len(self.operations)))
            for tensor in made:
                self.see(tensor)
        for tensor in made:
            if not any(tensor is given for given in tensors):
                self.events.append(Event(VIEW_MADE if operator.is_view else TENSOR_MADE, self._tensors, len(needing)))
                weakref.finalize(tensor, self._tensor_gone, self._tensors).atexit = False
                self._tensors += 1
        self.operations.append(operation)


@contextmanager
def _attention_of_cpu() -> Iterator[None]:
    """Within the block attention on meta tensors takes the algorithm that a CPU takes for such shapes.

    The function is replaced in its module, since a function mode does not reach what a backward computes again; on
    other tensors it is what it was.
    """
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if query.is_meta and torch.is_autocast_enabled("cpu"):  # which casts before the algorithm is chosen
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
        flash = query.is_meta and _takes_flash(query, key, value, attn_mask, *args, **kwargs)
        return (_flash if flash else original)(query, key, value, attn_mask, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if mask is not None and mask.dtype is torch.bool:  # as on a CPU, which adds 0 or -inf
        mask = torch.empty(mask.shape, dtype=query.dtype, device="meta").masked_fill_(mask.to("meta"), 0)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return attend(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


def _takes_flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
    """PyTorch's own choice, by tensors of the CPU that have the shapes and take no memory."""

    def like(t: Tensor) -> Tensor:
        made = torch.empty(t.shape[-1:], dtype=t.dtype, device="cpu").expand(t.shape)
        return made.detach().requires_grad_(t.requires_grad) if t.is_floating_point() else made

    with _disable_current_modes():
        on_cpu: Any = (like(query), like(key), like(value), None if mask is None else like(mask))
        choice: Any = torch._fused_sdp_choice
        return choice(*on_cpu, *args, **kwargs) == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
