"""Error for a rank that ends or hangs while others wait for it: which rank it is, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

from torch import distributed

from peftcore import ranks
from peftcore.errors import PeftcoreError

WAIT = 10.0  # seconds in which the other ranks answer
_BLOCKS = count()  # every rank enters the same blocks in the same order


@contextmanager
def naming_lost_ranks(what: str) -> Iterator[None]:
    """Name the ranks that do not answer where communication fails inside the block. Collective.

    Args:
        what: what has failed then, and what holds nevertheless, as a sentence without its full stop.

    Raises:
        PeftcoreError: communication has failed, and some ranks do not answer within `WAIT` seconds.
    """
    block = next(_BLOCKS)
    try:
        yield
        _answer(block)
    except PeftcoreError:
        raise
    except RuntimeError as error:  # of gloo and NCCL
        lost = _lost(block) if ranks.count() > 1 else []
        if not lost:
            raise
        which = f"rank {lost[0]} has not answered for {WAIT:g} s. Read its output"
        if len(lost) > 1:
            which = f"ranks {', '.join(map(str, lost))} have not answered for {WAIT:g} s, or wait for those that have "
            which += "ended. Read their output"
        raise PeftcoreError(f"{what}: {which}, and start the run again from its last checkpoint") from error


def _key(block: int, rank: int) -> str:
    return f"peftcore/answers/{block}/{rank}"


def _answer(block: int) -> None:
    if ranks.count() > 1:
        distributed.distributed_c10d._get_default_store().set(_key(block, ranks.rank()), "")


def _lost(block: int) -> list[int]:
    """Return the ranks that neither leave the same block nor reach this line within `WAIT` seconds."""
    keys = [_key(block, rank) for rank in range(ranks.count())]
    try:
        store = distributed.distributed_c10d._get_default_store()
        _answer(block)
        try:
            store.wait(keys, timedelta(seconds=WAIT))
        except RuntimeError:
            return [rank for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:  # the process that holds the store has ended: rank 0, where torchrun does not hold it
        return [0] if ranks.rank() else []
    return []
