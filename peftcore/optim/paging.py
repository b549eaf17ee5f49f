"""Paged optimizer state: a budget stays resident, and the rest is in an unnamed file or, for a GPU, in host memory.

All parameters of a device share one pool, so a thousand small factors page as well as one large matrix. Steps alternate
between walking the pages forward and backward; csrc/optim/pool.h describes when pages move.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from peftcore.ops import optim as ops
from peftcore.ops.dynamic8 import BLOCK, block_count
from peftcore.optim.base import FusedOptimizer
from peftcore.optim.batch import Batch, local

PAGE_BYTES = 4 << 20
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Paging:
    """Bytes of resident and paged state, and the traffic (in bytes) and waiting time (in seconds) so far."""

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
    """Parse a budget: a number of bytes, or text with a unit ("256MB", "2GiB"). Return None for "auto".

    Raises:
        ValueError: the budget has an invalid format.
    """
    if budget == "auto":
        return None
    match = re.fullmatch(r"([\d.]+)\s*(\w*)", str(budget))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"budget must be bytes, such as 268435456 or '256MB', or 'auto', found {budget!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def default_directory() -> str:
    """Return a directory for large temporary files: $TMPDIR, /var/tmp, or Python's default."""
    tmpdir = os.environ.get("TMPDIR") or "/var/tmp"
    return tmpdir if os.path.isdir(tmpdir) else tempfile.gettempdir()


def _margin(device: torch.device) -> int:
    """Return the number of bytes to leave free with budget="auto": a sixteenth of the memory.

    Memory that PyTorch has reserved on a GPU and does not use is subtracted, since pages are allocated from it.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[1] // 16 - unused
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16


@dataclass(frozen=True)
class _Place:
    """Location of a parameter's state: device, slot in its pages, and number of elements."""

    device: torch.device
    slot: int
    elements: int


class PagedOptimizer(FusedOptimizer):
    """A `FusedOptimizer` with paged state.

    Args:
        budget: bytes of state that may be resident on each device (at least one page), or "auto" to leave a sixteenth
            of the memory free, checked before every step.
        directory: directory of the page file for CPU state. The file has no name and disappears with the process.
        page_bytes: size of a page, a multiple of 4,096.
        options: options of `FusedOptimizer`.

    Raises:
        RuntimeError: the extension is missing, the disk is too small for all state, or a page cannot be written or
            read. No state is lost, and calling `step()` again completes the step.
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        budget: int | str = "auto",
        directory: str | os.PathLike[str] | None = None,
        page_bytes: int = PAGE_BYTES,
        **options: Any,
    ) -> None:
        missing = ops.why_no_pages()
        if missing is not None:
            raise RuntimeError(
                f"{type(self).__name__} needs the compiled extension, but {missing}. "
                f"{type(self).__name__.removeprefix('Paged')} works without it"
            )
        self._page_bytes = page_bytes
        self._budget, self._directory = self._parse_budget(budget), os.fspath(directory or default_directory())
        self._reset_pages()
        super().__init__(params, defaults, **options)

    def _parse_budget(self, budget: int | str) -> int | None:
        """Parse a budget and check it against the page size.

        Raises:
            ValueError: the budget is not a number of bytes, or is smaller than a page.
        """
        budget_bytes = bytes_of(budget)
        if budget_bytes is not None and budget_bytes < self._page_bytes:
            raise ValueError(f"budget must be at least one page ({self._page_bytes:,} bytes), found {budget_bytes:,}")
        return budget_bytes

    def _reset_pages(self) -> None:
        self._pages: dict[torch.device, Any] = {}
        self._places: dict[Tensor, _Place] = {}
        self._sweep = 0

    def _pages_on(self, device: torch.device) -> Any:
        if device not in self._pages:
            card = -1
            if device.type == "cuda":
                card = torch.cuda.current_device() if device.index is None else device.index
            budget = self._budget or self._page_bytes
            self._pages[device] = ops.paged_state(self.rule.name, self._page_bytes, budget, self._directory, card)
        return self._pages[device]

    # --- state in pages

    def _new_state(self, param: Tensor) -> None:
        shard = local(param)
        pages, place = self._pages_on(shard.device), self._places.get(param)
        if place is not None and (place.device, place.elements) == (shard.device, shard.numel()):
            pages.clear(place.slot)
        else:
            self._places[param] = _Place(shard.device, pages.allocate(shard.numel()), shard.numel())
        # New pages are zero, and with a scale of 0 every code means 0, so nothing needs to be written.

    def _slot(self, param: Tensor, shard: Tensor) -> int:
        """Return the slot with the state of `param`, whose local shard is `shard`.

        Raises:
            RuntimeError: the parameter was resized or moved after its state was created.
        """
        place = self._places[param]
        if place.elements != shard.numel() or place.device != shard.device:
            raise RuntimeError(
                f"a parameter had {place.elements:,} elements on {place.device} when its state was created, and now "
                f"has {shard.numel():,} on {shard.device}. Create a new optimizer for the changed parameters"
            )
        return place.slot

    def _get_state(self, param: Tensor) -> dict[str, Tensor]:
        shard, state = local(param), {}
        slot = self._slot(param, shard)
        for number, plane in enumerate(self.rule.planes):
            padded = torch.empty(plane.numel(block_count(shard.numel()) * BLOCK), dtype=plane.dtype, device="cpu")
            self._pages_on(shard.device).read(slot, number, padded.data_ptr(), padded.nbytes)
            state[plane.name] = plane.reshape(padded[: plane.numel(shard.numel())], shard)
        return state

    def _set_state(self, param: Tensor, values: dict[str, Tensor]) -> None:
        shard = local(param)
        slot = self._slot(param, shard)
        for number, plane in enumerate(self.rule.planes):
            padded = torch.zeros(plane.numel(block_count(shard.numel()) * BLOCK), dtype=plane.dtype, device="cpu")
            padded[: plane.numel(shard.numel())] = values[plane.name].detach().cpu().flatten()
            self._pages_on(shard.device).write(slot, number, padded.data_ptr(), padded.nbytes)

    def _update_of(self, batch: Batch) -> Callable[[], None]:
        device = batch.params[0].device
        pages = self._pages_on(device)
        if self._budget is None:
            pages.balance(_margin(device))
        slots = list(map(self._slot, batch.owners, batch.params))
        state = pages.number, slots, self._sweep
        return partial(ops.optim_step_paged_, batch.params, batch.grads, *state, self.rule.name, *batch.updates())

    def _count(self, batches: list[Batch], steps: int) -> None:
        super()._count(batches, steps)
        self._sweep += steps

    # --- public methods

    @property
    def budget(self) -> int | None:
        """Bytes that may be resident on each device, or None for "auto". Can be changed at any time."""
        return self._budget

    @budget.setter
    def budget(self, budget: int | str) -> None:
        budget_bytes = self._parse_budget(budget)
        for pages in self._pages.values():
            if budget_bytes is not None:
                pages.resize(budget_bytes)
        self._budget = budget_bytes

    def evict(self) -> None:
        """Page out all state. It is paged in again on demand."""
        for pages in list(self._pages.values()):
            pages.evict()

    def paging(self) -> Paging:
        """Return statistics of resident and paged state and of the traffic between them."""
        devices = list(self._pages.values())

        def total(name: str) -> Any:
            return sum(getattr(pages, name) for pages in devices)

        resident, allocated = total("resident_bytes"), total("pages") * self._page_bytes
        traffic = (total("bytes_in"), total("bytes_out"), float(total("seconds_waiting")))
        return Paging(resident, max(0, allocated - resident), total("peak_bytes"), *traffic)

    # --- copies and pickles contain the state itself

    def __getstate__(self) -> dict[str, Any]:
        options = {"budget": self._budget, "directory": self._directory, "page_bytes": self._page_bytes}
        return {**super().__getstate__(), "pages": (options, [(p, self._export_state(p)) for p in self.state])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pages = state.pop("pages", None)
        if pages is not None:
            options = pages[0]
            self._budget, self._directory = options["budget"], options["directory"]
            self._page_bytes = options["page_bytes"]
            self._reset_pages()
            state["state"].clear()
        super().__setstate__(state)
        for param, values in pages[1] if pages else ():
            self._install_state(param, self._convert_saved_state(param, values), int(values["step"]))
