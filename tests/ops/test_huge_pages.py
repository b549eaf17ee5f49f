"""Large weights are in huge pages where the system grants them, and have the same values everywhere."""

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.ops import huge_pages
from peftcore.ops.huge_pages import collapse, in_huge_pages, move_to_huge_pages

LARGE, PAGE = 5 << 20, 2 << 20
granted = pytest.mark.skipif(
    not huge_pages._huge_pages_enabled() or "VmFlags" not in Path("/proc/self/smaps").read_text(),
    reason="the system has no huge pages, or does not report them",
)


def flags(memory: Tensor) -> list[str]:
    """Return the kernel's flags of the mapping that holds the middle of a tensor."""
    middle = memory.data_ptr() + memory.nbytes // 2
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(each, 16) for each in mapping.partition(" ")[0].split("-"))
        if begin <= middle < end:
            return mapping.rpartition("VmFlags:")[2].split()
    raise AssertionError("no mapping holds the tensor")


def codes(count: int) -> nn.Parameter:
    return nn.Parameter(torch.arange(count).to(torch.uint8).view(-1, 1), requires_grad=False)


@granted
def test_a_copy_keeps_its_values() -> None:
    original = codes(LARGE).data
    found = in_huge_pages(original)
    assert found.data_ptr() != original.data_ptr() and torch.equal(found, original)
    assert "hg" in flags(found) and found.untyped_storage().nbytes() == LARGE
    small, on_meta = original[:100].clone(), original.to("meta")
    assert in_huge_pages(small) is small and in_huge_pages(on_meta) is on_meta


@granted
def test_tensors_share_mappings_and_keep_their_storages() -> None:
    sizes = [PAGE // 4 + 3, PAGE + 1, 5, 31 << 20, PAGE // 2]  # the fourth begins a second mapping
    moved = [codes(size) for size in sizes]
    wanted, before = [t.clone() for t in moved], [t.data_ptr() for t in moved]
    move_to_huge_pages(moved)
    assert all(torch.equal(t, each) for t, each in zip(moved, wanted, strict=True))
    assert [t.untyped_storage().nbytes() for t in moved] == sizes
    after = [t.data_ptr() for t in moved]
    assert not set(after) & set(before) and all(address % 64 == 0 for address in after)
    assert after[1] - after[0] == PAGE // 4 + 64
    assert ["hg" in flags(t) for t in moved] == [True, True, False, True, True]  # the third is in a quarter of a page
    mappings = [huge_pages._mappings[address] for address in after]
    assert [mapping is mappings[0] for mapping in mappings] == [True, True, True, False, False]
    move_to_huge_pages(moved)
    assert [t.data_ptr() for t in moved] == after


@granted
def test_a_mapping_lives_as_long_as_its_tensors() -> None:
    first, last = codes(PAGE), codes(PAGE)
    move_to_huge_pages([first, last])
    address = last.data_ptr()
    held = codes(7)
    held.data = last.data
    del first, last
    gc.collect()
    assert torch.equal(held, codes(PAGE)) and address in huge_pages._mappings
    del held
    assert address not in huge_pages._mappings


def test_some_tensors_stay_where_they_are() -> None:
    small, shared, view = codes(PAGE // 2), codes(PAGE).share_memory_(), codes(2 * PAGE)[:PAGE]
    dense = nn.Parameter(torch.randn(8, 8).T)
    before = [t.data_ptr() for t in (small, shared, view, dense)]
    for t in (small, shared, view, dense):
        move_to_huge_pages([t])
    move_to_huge_pages([nn.Parameter(torch.empty(PAGE, device="meta"))])
    assert [t.data_ptr() for t in (small, shared, view, dense)] == before


def test_a_dense_weight_is_collapsed_in_place() -> None:
    weight = torch.arange(PAGE, dtype=torch.float32)
    address, wanted = weight.data_ptr(), weight.clone()
    collapse(weight)
    collapse(weight[:10])
    assert weight.data_ptr() == address and torch.equal(weight, wanted)


@granted
def test_codes_of_affine4_are_in_huge_pages() -> None:
    weight = ops.quantize_affine4(torch.randn(2048, 4096 + 1024), 64)
    assert weight.codes.nbytes == LARGE and "hg" in flags(weight.codes)
    assert "hg" in flags(ops.quantize_4bit(torch.ones(4096, 4096)).codes)
