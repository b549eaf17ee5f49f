"""Pages under a budget: random schedules, faults of the page file, forks, threads, memory."""

import gc
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from peftcore import ops, optim
from peftcore.optim.paging import bytes_of

pytestmark = pytest.mark.skipif(ops.extension is None, reason="no _C")
PAGE = 4096


def parameters(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(200 + 90 * i, generator=generator)) for i in range(count)]


def step(optimizer, params, number):
    generator = torch.Generator().manual_seed(number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def paged(params, budget, kind=optim.PagedAdamW, **options):
    return kind(params, budget=budget, page_bytes=PAGE, **options)


def files_of(optimizer):
    """Descriptors of page files: without a name, of the size of the pages."""
    size = sum(pool.pages for pool in optimizer._pools.values()) * PAGE
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            if "(deleted)" in os.readlink(f"/proc/self/fd/{entry}") and os.fstat(int(entry)).st_size == size:
                found.append(int(entry))
        except OSError:
            continue
    return found


class Schedule(RuleBasedStateMachine):
    """Whatever happens in between, a paged optimizer has the bits of a resident one."""

    kinds = ((optim.PagedAdamW, optim.AdamW), (optim.PagedAdamW8bit, optim.AdamW8bit))

    @initialize(kind=st.sampled_from(kinds), pages=st.integers(1, 6))
    def begin(self, kind, pages):
        self.paged_kind = kind[0]
        self.mine, self.others = parameters(4), parameters(4)
        self.paged, self.resident = paged(self.mine, pages * PAGE, kind[0]), kind[1](self.others)
        self.budget, self.number = pages * PAGE, 0

    @rule(skip=st.sets(st.integers(0, 7)))
    def step(self, skip):
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        for i, (p, q) in enumerate(zip(self.mine, self.others, strict=True)):
            grad = torch.randn(p.shape, generator=generator)
            p.grad, q.grad = (None, None) if i in skip else (grad, grad.clone())
        self.paged.step()
        self.resident.step()

    @rule()
    def evict(self):
        self.paged.evict()
        assert self.paged.paging().resident == 0

    @rule(pages=st.integers(1, 12))
    def resize(self, pages):
        self.budget = self.paged.budget = pages * PAGE

    @rule(pages=st.integers(1, 6))
    def save_and_load(self, pages):
        saved = self.paged.state_dict()
        self.budget = pages * PAGE
        self.paged = paged(self.paged.param_groups[0]["params"], self.budget, self.paged_kind)
        for group in self.resident.param_groups[1:]:
            index = [i for i, q in enumerate(self.others) if any(q is p for p in group["params"])]
            self.paged.add_param_group({"params": [self.mine[i] for i in index]})
        self.paged.load_state_dict(saved)

    @precondition(lambda self: len(self.mine) < 8)
    @rule(lr=st.sampled_from([1e-3, 1e-2]))
    def add_group(self, lr):
        for params, optimizer in ((self.mine, self.paged), (self.others, self.resident)):
            params += parameters(1, seed=len(params))
            optimizer.add_param_group({"params": params[-1:], "lr": lr})

    @invariant()
    def same_bits_within_the_budget(self):
        if not hasattr(self, "mine"):
            return
        assert all(torch.equal(p, q) for p, q in zip(self.mine, self.others, strict=True))
        assert self.paged.paging().resident <= self.budget


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(max_examples=25, stateful_step_count=20, deadline=None, derandomize=True)


def test_only_what_exceeds_the_budget_moves():
    params = [nn.Parameter(torch.randn(512)) for _ in range(16)]  # a page each
    optimizer = paged(params, 4 * PAGE)
    for number in range(2):
        step(optimizer, params, number)
    before = optimizer.paging()
    for number in range(2, 6):
        step(optimizer, params, number)
    after = optimizer.paging()
    assert (after.read - before.read, after.written - before.written) == (4 * 12 * PAGE, 4 * 12 * PAGE)
    assert after.peak == 4 * PAGE and after.paged == 12 * PAGE


def test_a_budget_that_holds_everything_moves_nothing():
    params = parameters(6)
    optimizer = paged(params, 1 << 20)
    for number in range(4):
        step(optimizer, params, number)
    found = optimizer.paging()
    assert found.read == found.written == found.paged == 0
    assert str(found) == f"{found.resident / 1e6:,.1f} MB resident, 0.0 MB paged; 0.0 MB read, 0.0 MB written, " + (
        f"{found.waiting:.1f} s waiting"
    )


def test_budgets_are_bytes_or_text():
    assert [bytes_of(b) for b in (4096, "4096", "2kB", "1.5MB", "2 GiB", "auto")] == [
        4096,
        4096,
        2000,
        1_500_000,
        2 << 30,
        None,
    ]
    with pytest.raises(ValueError, match="budget must be bytes"):
        bytes_of("much")
    with pytest.raises(ValueError, match="budget must hold a page of 4,096 bytes, found 100"):
        paged(parameters(1), 100)
    with pytest.raises(ValueError, match="multiple of 4096"):
        optimizer = optim.PagedAdamW(params := parameters(1), page_bytes=5000, budget=5000)
        step(optimizer, params, 0)


def test_auto_keeps_all_where_memory_is_free():
    params = parameters(6)
    optimizer = paged(params, "auto")
    step(optimizer, params, 0)
    assert optimizer.budget is None and optimizer.paging().paged == 0


def test_auto_leaves_when_memory_is_short():
    pool = ops.extension.PagePool(PAGE, 64 * PAGE, "/tmp")
    pool.grow(16)
    data = torch.arange(PAGE, dtype=torch.uint8)
    for page in range(16):
        pool.write(page, 0, PAGE, data.data_ptr())
    assert pool.resident_bytes == 16 * PAGE
    pool.balance(1 << 60)  # more than there is
    assert pool.resident_bytes == PAGE and pool.budget == PAGE
    found = torch.zeros(PAGE, dtype=torch.uint8)
    for page in range(16):
        pool.read(page, 0, PAGE, found.data_ptr())
        assert torch.equal(found, data)


# --- faults of the page file: real ones, by limits and descriptors


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.iterdir()) == []


# --- processes and threads


def test_a_fork_is_refused_and_does_not_harm_its_parent():
    params, wanted = parameters(6), parameters(6)
    optimizer, resident = paged(params, 2 * PAGE), optim.AdamW(wanted)
    step(optimizer, params, 0)
    step(resident, wanted, 0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            step(optimizer, params, 1)
        except RuntimeError as error:
            status = 0 if "from which this one was forked" in str(error) else 2
        del optimizer
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    step(optimizer, params, 1)
    step(resident, wanted, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))


def test_threads_with_optimizers_of_their_own_and_one_that_only_looks():
    wanted = parameters(6)
    resident = optim.AdamW(wanted)
    for number in range(20):
        step(resident, wanted, number)
    found = [parameters(6) for _ in range(3)]
    optimizers = [paged(params, 2 * PAGE) for params in found]
    ends = threading.Event()

    def work(params, optimizer):
        for number in range(20):
            step(optimizer, params, number)

    def look():
        while not ends.is_set():
            for optimizer in optimizers:
                for pool in list(optimizer._pools.values()):
                    pool.evict()

    threads = [threading.Thread(target=work, args=pair) for pair in zip(found, optimizers, strict=True)]
    watcher = threading.Thread(target=look)
    for thread in [*threads, watcher]:
        thread.start()
    for thread in threads:
        thread.join()
    ends.set()
    watcher.join()
    for params in found:
        assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))


def resident_memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_no_leak_over_ten_thousand_steps():
    params = parameters(4)
    optimizer = paged(params, 2 * PAGE)
    for p in params:
        p.grad = torch.randn(p.shape)
    for _ in range(500):
        optimizer.step()
    gc.collect()  # what earlier tests left, which may hold files
    memory, descriptors = resident_memory(), len(os.listdir("/proc/self/fd"))
    for _ in range(10_000):
        optimizer.step()
    assert resident_memory() - memory < 2 << 20
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_an_optimizer_that_is_gone_gives_its_memory_and_file_back():
    for _ in range(3):
        params = [nn.Parameter(torch.zeros(1 << 20))]
        optimizer = optim.PagedAdamW(params, budget="8MiB", directory="/tmp")
        step(optimizer, params, 0)
        descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        del optimizer
        assert len(os.listdir("/proc/self/fd")) == descriptors - 1 and threading.active_count() == threads


@pytest.mark.parametrize("kind", [optim.PagedAdamW, optim.PagedAdamW8bit])
@pytest.mark.parametrize("count", [5000, 100])
def test_a_parameter_that_changed_its_size_does_not_write_into_anothers_state(kind, count):
    params = parameters(3)
    optimizer = paged(params, 4 * PAGE, kind)
    step(optimizer, params, 0)
    before = {name: value.clone() for name, value in optimizer._get_state(params[1]).items()}
    params[0].data = torch.randn(count)
    with pytest.raises(RuntimeError, match=rf"had 200 elements on cpu when its state was made, and has {count:,}"):
        step(optimizer, params, 1)
    assert all(torch.equal(value, before[name]) for name, value in optimizer._get_state(params[1]).items())
    with pytest.raises(RuntimeError, match="Make a new optimizer"):
        optimizer.state_dict()


KINDS = [(optim.PagedAdamW, optim.AdamW), (optim.PagedAdamW8bit, optim.AdamW8bit)]
KINDS += [(optim.AdamW, optim.PagedAdamW), (optim.AdamW8bit, optim.PagedAdamW8bit)]


def _shorter(state):
    name = next(name for name in ("exp_avg_absmax", "exp_avg") if name in state)
    state[name] = state[name][:-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda saved: _shorter(saved["state"][2]), "the state of parameter 2 does not fit: saved 'exp_avg"),
        (
            lambda saved: saved["state"][1].pop("exp_avg_sq"),
            "parameter 1 does not fit: .* lacks the tensor 'exp_avg_sq'",
        ),
        (
            lambda saved: saved["state"][0].update(exp_avg=3.0),
            "parameter 0 does not fit: .* lacks the tensor 'exp_avg'",
        ),
        (lambda saved: saved["param_groups"][0]["params"].pop(), r"groups of \[2\] parameters, .* has groups of \[3\]"),
    ],
)
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: kinds[0].__name__)
def test_a_load_that_fails_leaves_the_state(kinds, damage, message):
    kind, _ = kinds
    options = {"budget": 2 * PAGE, "page_bytes": PAGE} if "Paged" in kind.__name__ else {}
    params, others = parameters(3), parameters(3)
    optimizer, beside = kind(params, **options), kind(others, **options)
    for number in range(2):
        step(optimizer, params, number)
        step(beside, others, number)
    saved = optimizer.state_dict()
    step(optimizer, params, 2)
    step(beside, others, 2)
    damage(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    step(optimizer, params, 3)
    step(beside, others, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("kind", [optim.PagedAdamW, optim.PagedAdamW8bit])
def test_loading_again_and_again_takes_no_more_pages(kind):
    params, others = parameters(5), parameters(5)
    optimizer, beside = paged(params, 2 * PAGE, kind), kind(others)
    for number in range(3):
        step(optimizer, params, number)
        step(beside, others, number)
    pages = sum(pool.pages for pool in optimizer._pools.values())
    saved = optimizer.state_dict()
    for _ in range(5):
        optimizer.load_state_dict(saved)
    assert sum(pool.pages for pool in optimizer._pools.values()) == pages
    step(optimizer, params, 3)
    step(beside, others, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    optimizer.load_state_dict({**saved, "state": {}})  # as a new one: what lay in the pages is not read again
    fresh = kind(others)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    step(optimizer, params, 4)
    step(fresh, others, 4)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
