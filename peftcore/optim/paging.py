"""State in pages: a budget of bytes is resident, the rest lies in a file without a name, or beside a card in memory.

All parameters of a device share one pool, so a thousand small factors page as well as one large matrix. The step walks
the pages forward and backward by turns; csrc/optim/pool.h says what moves when.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.ops import _extension
from peftcore.ops import optim as ops
from peftcore.optim.base import FusedOptimizer, local

PAGE_BYTES = 4 << 20
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Paging:
    """Where state lies, and what moving it has cost so far. Bytes and seconds."""

    resident: int
    paged: int
    peak: int
    read: int
    written: int
    waiting: float

    def __str__(self) -> str:
        mb = [f"{count / 1e6:,.1f} MB" for count in (self.resident, self.paged, self.read, self.written)]
        return f"{mb[0]} resident, {mb[1]} paged; {mb[2]} read, {mb[3]} written, {self.waiting:.1f} s waiting"


def bytes_of(budget: int | str) -> int | None:
    """A number of bytes, also as text with a unit ("256MB", "2GiB"); None for "auto".

    Raises:
        ValueError: it is neither.
    """
    if budget == "auto":
        return None
    found = re.fullmatch(r"([\d.]+)\s*(\w*)", str(budget))
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError(f"budget must be bytes, such as 268435456 or '256MB', or 'auto', found {budget!r}")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def default_directory() -> str:
    """Where temporary files may be large: $TMPDIR, /var/tmp, or where Python puts them."""
    named = os.environ.get("TMPDIR") or "/var/tmp"
    return named if os.path.isdir(named) else tempfile.gettempdir()


def _margin(device: torch.device) -> int:
    """Memory to leave free under budget="auto": a sixteenth of all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] // 16
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16


@dataclass(frozen=True)
class _Slot:
    """Where a parameter's state lies: on which device's pages, from which block of 256 elements, and how many."""

    device: torch.device
    first: int
    elements: int


class PagedOptimizer(FusedOptimizer):
    """A `FusedOptimizer` with state in pages.

    Args:
        budget: bytes of state that may be resident on each device (at least a page), or "auto": as much as leaves a
            sixteenth of the memory free, looked at before every step.
        directory: where the page file of the CPU's state is made. It has no name and is gone with the process.
        page_bytes: a page, a multiple of 4,096.

    Raises:
        RuntimeError: the extension is missing; the disk has no room for all state (before anything is lost); a page
            cannot be written or read. Then nothing is lost, and `step()` called again completes the step.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        budget: int | str = "auto",
        directory: str | os.PathLike[str] | None = None,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        if _extension.extension is None:
            raise RuntimeError(
                f"{type(self).__name__} pages through the compiled extension: {_extension.missing_because}. "
                f"{type(self).__name__.removeprefix('Paged')} works without it"
            )
        self._budget, self._directory = bytes_of(budget), os.fspath(directory or default_directory())
        self._page_bytes = page_bytes
        if self._budget is not None and self._budget < page_bytes:
            raise ValueError(f"budget must hold a page of {page_bytes:,} bytes, found {self._budget:,}")
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        self._pools: dict[torch.device, Any] = {}
        self._blocks: dict[torch.device, int] = {}  # in use
        self._slots: dict[Tensor, _Slot] = {}
        self._sweep = 0

    @property
    def _plane_bytes(self) -> list[int]:
        """Of a block of 256 elements."""
        return [{4: 1024, 1: 256, 0: 4}[size] for size in ops.PLANES[self.rule]]

    @property
    def _page_blocks(self) -> int:
        return self._page_bytes // sum(self._plane_bytes)

    def _pool(self, device: torch.device) -> Any:
        if device not in self._pools:
            card = -1
            if device.type == "cuda":
                card = torch.cuda.current_device() if device.index is None else device.index
            self._pools[device] = _extension.extension.PagePool(
                self._page_bytes, self._budget or self._page_bytes, self._directory, card
            )
            self._blocks[device] = 0
        return self._pools[device]

    # --- state in pages

    def _new_state(self, param: Tensor) -> None:
        own = local(param)
        kept = self._slots.get(param)
        if kept == _Slot(own.device, kept.first if kept else 0, own.numel()):
            self._clear(param)
            return
        count, pool = ops.blocks_of(own.numel()), self._pool(own.device)
        first = self._blocks[own.device]
        pool.grow(-(-(first + count) // self._page_blocks))
        self._slots[param] = _Slot(own.device, first, own.numel())
        self._blocks[own.device] = first + count
        # Pages begin as zeros; the signed map's code of 0 needs none written, since its scale is 0.

    def _slot(self, param: Tensor) -> _Slot:
        """Where the state of `param` lies.

        Raises:
            RuntimeError: the parameter is no longer what it was: its pages are others' beyond its former size.
        """
        slot, own = self._slots[param], local(param)
        if (slot.device, slot.elements) != (own.device, own.numel()):
            raise RuntimeError(
                f"a parameter had {slot.elements:,} elements on {slot.device} when its state was made, and has "
                f"{own.numel():,} on {own.device} now. Make a new optimizer for the changed parameters"
            )
        return slot

    def _clear(self, param: Tensor) -> None:
        pool = self._pool(local(param).device)
        zeros = torch.zeros(self._page_bytes, dtype=torch.uint8)
        for plane in range(len(self.planes)):
            for page, offset, _, count in self._places(param, plane):
                pool.write(page, offset, count, zeros.data_ptr())

    def _places(self, param: Tensor, plane: int) -> Iterator[tuple[int, int, int, int]]:
        """Where a plane of a parameter's state lies: (page, offset, offset in the plane, bytes), in order."""
        size, total = self._plane_bytes[plane], ops.blocks_of(local(param).numel())
        first, per_page = self._slot(param).first, self._page_blocks
        begin = per_page * sum(self._plane_bytes[:plane])
        done = 0
        while done < total:
            page, block = divmod(first + done, per_page)
            count = min(total - done, per_page - block)
            yield page, begin + block * size, done * size, count * size
            done += count

    def _get_state(self, param: Tensor) -> dict[str, Tensor]:
        own, found = local(param), {}
        pool = self._pool(own.device)
        for plane, (name, size) in enumerate(zip(self.planes, ops.PLANES[self.rule], strict=True)):
            raw = torch.empty(ops.blocks_of(own.numel()) * self._plane_bytes[plane], dtype=torch.uint8)
            for page, offset, begin, count in self._places(param, plane):
                pool.read(page, offset, count, raw.data_ptr() + begin)
            value = raw if size == 1 else raw.view(torch.float32)
            found[name] = value if size == 0 else value[: own.numel()].view(own.shape)
        return found

    def _set_state(self, param: Tensor, values: dict[str, Tensor]) -> None:
        pool = self._pool(local(param).device)
        for plane, name in enumerate(self.planes):
            raw = torch.zeros(ops.blocks_of(local(param).numel()) * self._plane_bytes[plane], dtype=torch.uint8)
            given = values[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
            raw[: given.numel()] = given
            for page, offset, begin, count in self._places(param, plane):
                pool.write(page, offset, count, raw.data_ptr() + begin)

    def _update(self, params: list[Tensor], owners: list[Tensor], *step: Any) -> None:
        grads, scalars, steps, rows, streams = step
        device = params[0].device
        pool = self._pool(device)
        if self._budget is None:
            pool.balance(_margin(device))
        slots = [self._slot(p).first for p in owners]
        backward = bool(self._sweep % 2)
        ops.optim_step_paged_(
            params, grads, pool.number, slots, self.rule, scalars, steps, rows, streams, self._sweep, backward
        )

    def _stepped(self) -> None:
        self._sweep += 1

    # --- what a user may ask

    @property
    def budget(self) -> int | None:
        """Bytes that may be resident on each device, None for "auto". Set it to another at any time."""
        return self._budget

    @budget.setter
    def budget(self, budget: int | str) -> None:
        wanted = bytes_of(budget)
        for pool in self._pools.values():
            if wanted is not None:
                pool.resize(wanted)
        self._budget = wanted

    def evict(self) -> None:
        """Let all state leave now; it comes back when it is needed."""
        for pool in self._pools.values():
            pool.evict()

    def paging(self) -> Paging:
        """Where state lies now, and what moving it has cost."""
        pools = list(self._pools.values())

        def total(name: str) -> Any:
            return sum(getattr(pool, name) for pool in pools)

        resident, whole = total("resident_bytes"), sum(pool.pages * self._page_bytes for pool in pools)
        moved = (total("bytes_in"), total("bytes_out"), float(total("seconds_waiting")))
        return Paging(resident, max(0, whole - resident), total("peak_bytes"), *moved)

    # --- copies and pickles hold the state itself

    def __getstate__(self) -> dict[str, Any]:
        options = {"budget": self._budget, "directory": self._directory, "page_bytes": self._page_bytes}
        return {**super().__getstate__(), "pages": (options, [(p, self._exported(p)) for p in self.state])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pages = state.pop("pages", None)
        if pages is not None:
            options = pages[0]
            self._budget, self._directory = options["budget"], options["directory"]
            self._page_bytes = options["page_bytes"]
            self._forget()
            state["state"].clear()
        super().__setstate__(state)
        for param, values in pages[1] if pages else ():
            self._take_over(param, self._read(param, values), int(values["step"]))
