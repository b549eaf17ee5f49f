"""Faults of the page file: real ones, by limits and descriptors. No fault loses state."""

import os
import resource

import pytest
import torch
from support import fresh_process
from support.paged_optimizers import PAGE, paged, pages_of, parameters, step
from torch import nn

from peftcore import ops, optim
from peftcore.ops import optim as operators

pytestmark = pytest.mark.skipif(ops.extension is None, reason="no _C")


def files_of(optimizer):
    """Descriptors of page files: without a name, of the size of the pages."""
    size = pages_of(optimizer) * PAGE
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            if "(deleted)" in os.readlink(f"/proc/self/fd/{entry}") and os.fstat(int(entry)).st_size == size:
                found.append(int(entry))
        except OSError:
            continue
    return found


class file_limit:
    """No file of this process grows or is written beyond so many bytes."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("kind", [optim.PagedAdamW, optim.PagedAdamW8bit])
def test_a_full_disk_is_an_error_before_anything_is_lost(kind):
    params = parameters(6)
    optimizer = paged(params, 2 * PAGE, kind)
    before = [p.detach().clone() for p in params]
    with file_limit(PAGE), pytest.raises(RuntimeError, match=r"needs a page file of \d+ bytes in .*directory="):
        step(optimizer, params, 0)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    step(optimizer, params, 0)
    wanted = parameters(6)
    resident = (optim.AdamW if kind is optim.PagedAdamW else optim.AdamW8bit)(wanted)
    step(resident, wanted, 0)
    assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))


@pytest.mark.parametrize("limit", [3 * PAGE, 3 * PAGE + 1000, 6 * PAGE])  # refused, and written short
@pytest.mark.parametrize("budget", [1, 2, 5])
def test_a_page_that_cannot_be_written_stays(limit, budget):
    params, wanted = parameters(8), parameters(8)
    optimizer, resident = paged(params, budget * PAGE), optim.AdamW(wanted)
    for number in range(3):
        step(optimizer, params, number)
        step(resident, wanted, number)
    with file_limit(limit), pytest.raises(RuntimeError, match=r"cannot be written: .*Nothing is lost"):
        for number in range(3, 5):
            step(optimizer, params, number)
            step(resident, wanted, number)
    step(optimizer, params, number)  # completes the step that stopped
    step(resident, wanted, number)
    assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))
    step(optimizer, params, 9)
    step(resident, wanted, 9)
    assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))
    assert optimizer.paging().resident <= budget * PAGE


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_a_page_that_cannot_be_read_is_still_there(budget, tmp_path):
    params, wanted = parameters(8), parameters(8)
    optimizer, resident = paged(params, budget * PAGE), optim.AdamW(wanted)
    for number in range(3):
        step(optimizer, params, number)
        step(resident, wanted, number)
    (descriptor,) = files_of(optimizer)
    kept = os.dup(descriptor)
    blind = os.open(tmp_path / "blind", os.O_WRONLY | os.O_CREAT)
    os.dup2(blind, descriptor)
    try:
        with pytest.raises(RuntimeError, match=r"cannot be read: Bad file descriptor.*Call step\(\) again"):
            step(optimizer, params, 3)
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(blind)
    written = (tmp_path / "blind").read_bytes()  # pages that left meanwhile
    with open(f"/proc/self/fd/{descriptor}", "r+b", buffering=0) as file:
        for begin in range(0, len(written), PAGE):
            if any(written[begin : begin + PAGE]):
                os.pwrite(file.fileno(), written[begin : begin + PAGE], begin)
    step(optimizer, params, 3)
    step(resident, wanted, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))


def test_strided_parameters_keep_what_was_updated_before_a_fault():
    """The operator updates contiguous copies of them."""

    def strided(params):
        return [nn.Parameter(p.detach().view(-1, 10).t().contiguous().t()) for p in params]

    params, wanted = strided(parameters(8)), strided(parameters(8))
    optimizer, resident = paged(params, PAGE), optim.AdamW(wanted)
    assert not params[0].is_contiguous()
    for number in range(3):
        step(optimizer, params, number)
        step(resident, wanted, number)
    with file_limit(3 * PAGE), pytest.raises(RuntimeError, match=r"cannot be written: .*Nothing is lost"):
        for number in range(3, 6):
            step(optimizer, params, number)
            step(resident, wanted, number)
    step(optimizer, params, number)  # completes the step that stopped
    step(resident, wanted, number)
    assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))


@pytest.mark.parametrize("kind", [optim.PagedAdamW8bit, optim.PagedSGD, optim.AdamW, optim.AdamW8bit])
def test_ctrl_c_in_a_step_is_raised_when_it_is_done(kind, monkeypatch):
    """Python raises KeyboardInterrupt where the operator returns; the next step is another one."""
    params, wanted = parameters(8), parameters(8)
    if issubclass(kind, optim.PagedAdamW8bit | optim.PagedSGD):
        resident_kind = optim.AdamW8bit if kind is optim.PagedAdamW8bit else optim.SGD
        optimizer, resident = paged(params, 2 * PAGE, kind), resident_kind(wanted)
    else:
        optimizer, resident = kind(params), kind(wanted)
    step(optimizer, params, 0)
    step(resident, wanted, 0)
    with monkeypatch.context() as patch:
        for name in ("optim_step_", "optim_step_paged_"):
            patch.setattr(operators, name, interrupted(getattr(operators, name)))
        with pytest.raises(KeyboardInterrupt):
            step(optimizer, params, 1)
    step(resident, wanted, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))
    step(optimizer, params, 2)
    step(resident, wanted, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))


def interrupted(operator):
    def call(*arguments):
        operator(*arguments)
        raise KeyboardInterrupt

    return call


def test_a_directory_that_is_not_there():
    params = parameters(1)
    optimizer = paged(params, PAGE, directory="/no/such/folder")
    with pytest.raises(RuntimeError, match=r"no page file can be made in '/no/such/folder': No such file.*directory="):
        step(optimizer, params, 0)


def test_nothing_is_on_disk_after_a_crash(tmp_path):
    code = f"""
import os, torch
from torch import nn
from peftcore import optim
p = nn.Parameter(torch.ones(100_000))
p.grad = torch.ones_like(p)
o = optim.PagedAdamW([p], budget=4096, page_bytes=4096, directory={str(tmp_path)!r})
o.step()
assert o.paging().paged > 0
os.kill(os.getpid(), 9)
"""
    done = fresh_process.run(code)
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.iterdir()) == []
