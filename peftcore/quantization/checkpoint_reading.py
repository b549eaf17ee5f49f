"""How transformers reads a checkpoint within a block: tensor by tensor, into memory that is given back."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

Change = Callable[[], contextlib.AbstractContextManager[None]]


def _while_any(change: Change) -> Change:
    """Make a change of the process last from the first thread that enters its block to the last one that leaves.

    If each thread made the change, one that overlaps would save what another has changed, and restore that.
    """
    lock, inside, undo = threading.Lock(), set[object](), contextlib.ExitStack()

    @contextlib.contextmanager
    @functools.wraps(change)
    def changed() -> Iterator[None]:
        own = object()
        try:
            with lock:
                if not inside:
                    undo.enter_context(change())
                inside.add(own)
            yield
        finally:
            with lock:
                inside.discard(own)
                if not inside:
                    undo.close()

    return changed


@_while_any
@contextlib.contextmanager
def read_when_needed() -> Iterator[None]:
    """Make transformers read a quantized tensor when it is converted within the block, not ahead by threads.

    The memory of what threads have read is not reused for converted weights: a checkpoint would take twice its size.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@_while_any
@contextlib.contextmanager
def not_mapped() -> Iterator[None]:
    """Make transformers read weights instead of memory-mapping files within the block.

    Pages read from a mapped file stay in memory until it is closed, so at the end of loading the whole dense checkpoint
    would be resident in addition to the quantized model. Other threads that load at the same time get the same values.
    """
    import transformers.modeling_utils as reader

    opened = reader.safe_open

    def opened_to_read(*args: Any, **kwargs: Any) -> Any:
        return opened(*args, **({**kwargs, "backend": "pread"} if kwargs.get("backend") == "mmap" else kwargs))

    reader.safe_open = opened_to_read
    try:
        yield
    finally:
        reader.safe_open = opened
