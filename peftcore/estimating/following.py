"""Simulation of a training step on meta tensors, which records the lifetime of every storage.

Floating-point tensors are on the meta device, and small integer tensors are real (`model.meta`). Where PyTorch chooses
an algorithm by device, the CPU's algorithm is used.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from peftcore.errors import PeftcoreError
from peftcore.estimating.costs import FREE, Cost, cost
from peftcore.ops.linear_cross_entropy import workspace, workspace_of_weight
from peftcore.ops.weight import weight_from_operands
from peftcore.plugin import MetaFloats, ranks

LARGEST_INDEX = 1 << 22  # integer tensors with more values than this are on the meta device


class NotFollowed(PeftcoreError):
    """A model or its training step cannot run without values."""


@dataclass(slots=True)
class Storage:
    """Memory that exists from operation `born` to operation `died`, or to the end if `died` is None.

    Args:
        shape: Shape of the first tensor in it.
        kind: Purpose, as far as it is known.
        module: Path of the module that created it.
    """

    bytes: int
    shape: tuple[int, ...]
    born: int
    died: int | None = None
    kind: str | None = None
    module: str = ""


@dataclass(slots=True)
class Operation:
    """One call of an operator.

    Args:
        name: Name in the operator's schema.
        module: Path of the module whose forward called the operator; outside all modules, path of the module whose
            results it reads.
        phase: Part of the step.
        recomputed: Whether it belongs to a forward that is recomputed in the backward pass.
    """

    name: str
    module: str
    phase: str
    cost: Cost = FREE
    recomputed: bool = False


def births_and_deaths(storages: Sequence[Storage]) -> tuple[dict[int, list[int]], dict[int, list[int]], list[int]]:
    """Return indices of storages: created by each operation, freed before it, and alive throughout."""
    born, died, stay = defaultdict(list), defaultdict(list), []
    for number, storage in enumerate(storages):
        if storage.born == 0 and storage.died is None:
            stay.append(number)
            continue
        born[storage.born].append(number)
        if storage.died is not None:
            died[storage.died].append(number)
    return born, died, stay


def _unpacked_bytes(operator: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes of the dense weight (of all experts) that a GPU unpacks for many rows or a gradient."""
    arguments = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False))
    rows = arguments.get("grad", arguments.get("x"))
    if rows is None or not arguments.get("packing"):
        return 0
    shape = weight_from_operands(arguments["weight"], arguments["packing"], operator._schema.name).shape
    few = 64 if len(shape) == 2 else 16 * shape[0]
    if "grad" not in arguments and rows[..., 0].numel() <= few:
        return 0
    return int(torch.Size(shape).numel() * rows.element_size())


class Following:
    """Recorder of all operations in `with following.running(model):`, on this machine or on a GPU."""

    def __init__(self, *, on_card: bool = False) -> None:
        self.on_card = on_card
        self.storages: list[Storage] = []
        self.operations: list[Operation] = []
        self.phase = ""
        self._ended = False
        self._modules: list[str] = []  # modules whose forward is running
        self._live: dict[int, Storage] = {}

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Record everything that runs within the block, by the paths of `model`'s modules."""
        paths = {id(module): path for path, module in model.named_modules()}

        def enter(module: nn.Module, _: Any) -> None:
            if id(module) in paths:
                self._modules.append(paths[id(module)])

        def leave(module: nn.Module, *_: Any) -> None:
            if id(module) in paths and self._modules:
                self._modules.pop()

        for hook in (enter, leave):
            vars(hook)["only_looks"] = True  # for code that behaves differently if there are hooks

        with ExitStack() as stack:
            hooks = torch.nn.modules.module
            stack.callback(hooks.register_module_forward_pre_hook(enter).remove)
            stack.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)
            stack.enter_context(_attention_as_on_cpu())
            stack.enter_context(MetaFloats(self._record, LARGEST_INDEX))
            yield

    def see(self, tensor: Tensor, kind: str | None = None, *, only_new: bool = False) -> None:
        """Record the tensor's storage and its purpose `kind`; with `only_new`, keep a recorded purpose."""
        if tensor.layout is not torch.strided:
            raise NotFollowed(
                f"the step creates a tensor with layout {tensor.layout}, whose memory cannot be estimated. Use dense "
                "tensors"
            )
        storage = ranks.local(tensor).untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is None:
            module = self._modules[-1] if self._modules else ""
            known = Storage(
                storage.nbytes(), tuple(ranks.local(tensor).shape), len(self.operations), None, kind, module
            )
            self._live[key] = known
            weakref.finalize(storage, self._record_free, key, known).atexit = False
            self.storages.append(known)
        elif kind is not None and not (only_new and known.kind):
            known.kind = kind

    def release(self, tensor: Tensor) -> None:
        """Record that the tensor's memory is freed although the tensor still exists. `see` allocates it again."""
        key = ranks.local(tensor).untyped_storage()._cdata
        self._record_free(key, self._live[key])

    def pass_by(self, name: str) -> None:
        """Record an operation that is not visible to PyTorch's dispatcher."""
        module_path = self._modules[-1] if self._modules else ""
        self.operations.append(Operation(name, module_path, self.phase))

    def end(self) -> None:
        """Stop recording, so that tensors that still exist stay in the record when the meta model is deleted."""
        self._ended = True

    def _record_free(self, key: int, storage: Storage) -> None:
        if self._ended or storage.died is not None:
            return
        storage.died = len(self.operations)
        if self._live.get(key) is storage:
            del self._live[key]

    def _record(self, operator: Any, args: tuple[Any, ...], tensors: list[Tensor], output: Any) -> None:
        module_path = self._modules[-1] if self._modules else ""
        if not module_path:
            for tensor in tensors:
                storage = self._live.get(tensor.untyped_storage()._cdata)
                if storage is not None and storage.module:
                    module_path = storage.module
        again = bool(self._modules) and self.phase.startswith("backward")
        operation = Operation(operator._schema.name, module_path, self.phase, recomputed=again)
        if not operator.is_view:
            result = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            operation.cost = cost(operator, args, output, on_card=self.on_card)
            result.append(self._workspace(operator, args))
            for tensor in result:
                self.see(tensor)
        self.operations.append(operation)

    def _workspace(self, operator: Any, args: tuple[Any, ...]) -> Tensor:
        """Return a tensor as large as the operator's temporary memory."""
        name, size, device = operator._schema.name, 0, torch.device("cuda" if self.on_card else "cpu")
        if name == "peftcore::linear_cross_entropy":
            hidden, weight, packing = args[:3]
            classes = weight_from_operands(weight, packing, name).shape[0]
            size = workspace(hidden, weight, packing, classes, device)
        elif name == "peftcore::linear_cross_entropy_weight":
            size = workspace_of_weight(args[0], args[1].shape[0], device)
        elif self.on_card:
            size = _unpacked_bytes(operator, args)
        return torch.empty(size, dtype=torch.uint8, device="meta")


@contextmanager
def _attention_as_on_cpu() -> Iterator[None]:
    """Make attention on meta tensors use the algorithm that a CPU uses for such shapes, within the block.

    The function is replaced in its module because a function mode does not reach recomputation in a backward pass. For
    other tensors it is unchanged.
    """
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if has_torch_function((query, key, value)):  # other modes take precedence, such as the mode of fused attention
            arguments = (query, key, value, attn_mask, *args)
            return handle_torch_function(attention, arguments[:3], *arguments, **kwargs)
        if query.is_meta and torch.is_autocast_enabled("cpu"):  # autocast casts before the algorithm is chosen
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
    if mask is not None and mask.dtype is torch.bool:  # a CPU adds 0 or -inf
        mask = torch.empty(mask.shape, dtype=query.dtype, device="meta").masked_fill_(mask.to("meta"), 0)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return attend(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


def _takes_flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
    """Return whether PyTorch chooses flash attention for CPU tensors of these shapes (created without memory)."""

    def like(t: Tensor) -> Tensor:
        result = torch.empty(t.shape[-1:], dtype=t.dtype, device="cpu").expand(t.shape)
        return result.detach().requires_grad_(t.requires_grad) if t.is_floating_point() else result

    with _disable_current_modes():
        on_cpu: Any = (like(query), like(key), like(value), None if mask is None else like(mask))
        choice: Any = torch._fused_sdp_choice
        return choice(*on_cpu, *args, **kwargs) == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
