"""A run starts, also again after a restart, and after `finish` none of its threads is left."""

from __future__ import annotations

import sys

import pytest
from support.processes import run
from support.ranks import endings
from support.releases import TORCH_2_9

import peftcore

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
named_threads = pytest.mark.skipif(TORCH_2_9, reason="PyTorch 2.9 does not name its threads")


def test_a_restarted_run_has_keys_of_its_own() -> None:
    assert run(endings.started_twice, joined=False) == [[(False, 2.0), (False, 2.0)]] * 2


@on_linux
@named_threads
@pytest.mark.parametrize("how", ["fsdp2, finish", "fsdp2, destroy, then finish", "ddp, finish"])
def test_no_thread_is_left(how: str) -> None:
    for found in run(endings.ended, how):
        assert found["before"]
        assert not found["after"]


@on_linux
@named_threads
def test_without_it_threads_are_left() -> None:
    """What is worked around: where this fails, PyTorch does it itself."""
    assert all(found["after"] == found["before"] for found in run(endings.ended, "fsdp2, destroy"))


def test_a_rank_that_fails_waits_for_nobody() -> None:
    assert run(endings.failing_alone) == ["of rank 0", "waits"]


def test_without_a_run_nothing_happens() -> None:
    peftcore.distributed.finish()


class Hiding:
    """As an object of C whose attributes cannot be read: a library of cffi, which soundfile imports."""

    @property
    def __dict__(self) -> dict[str, object]:  # type: ignore[override]
        raise AttributeError("'Hiding' object has no attribute '__dict__'")


def test_objects_that_hide_their_attributes_are_left_alone() -> None:
    held = Hiding()
    peftcore.distributed.finish()
    assert type(held) is Hiding
