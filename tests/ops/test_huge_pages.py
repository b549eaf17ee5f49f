"""Large codes are in huge pages where the system grants them, and have the same values everywhere."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftcore import ops
from peftcore.ops.huge_pages import empty_bytes, in_huge_pages

LARGE = 5 << 20
CPU = torch.device("cpu")


def flags(memory: Tensor) -> list[str]:
    """Return the kernel's flags of the mapping that holds the middle of a tensor."""
    middle = memory.data_ptr() + memory.nbytes // 2
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(each, 16) for each in mapping.partition(" ")[0].split("-"))
        if begin <= middle < end:
            return mapping.rpartition("VmFlags:")[2].split()
    raise AssertionError("no mapping holds the tensor")


def test_codes_keep_their_values() -> None:
    codes = torch.randint(256, (LARGE, 1), dtype=torch.uint8)
    found = in_huge_pages(codes)
    assert found.data_ptr() != codes.data_ptr() and torch.equal(found, codes)
    small = codes[:100]
    assert in_huge_pages(small) is small
    on_meta = codes.to("meta")
    assert in_huge_pages(on_meta) is on_meta
    assert empty_bytes((3, 2), CPU).shape == (3, 2) and empty_bytes((LARGE,), torch.device("meta")).is_meta


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
def test_large_codes_ask_for_huge_pages() -> None:
    assert "hg" in flags(empty_bytes((LARGE,), CPU))
    weight = ops.quantize_affine4(torch.randn(2048, 4096 + 1024), 64)
    assert weight.codes.nbytes == LARGE and "hg" in flags(weight.codes)
