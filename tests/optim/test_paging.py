"""Pages under a budget: random schedules, what moves, what is resident, and state that is another's."""

import pytest
import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.paged_optimizers import PAGE, paged, parameters, step
from torch import nn

from peftcore import ops, optim
from peftcore.ops.optim import optim_step_paged_
from peftcore.optim.paging import bytes_of

pytestmark = pytest.mark.skipif(ops.extension is None, reason="no _C")


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
    with pytest.raises(ValueError, match="budget must be at least one page \\(4,096 bytes\\), found 100"):
        paged(parameters(1), 100)
    smaller = paged(parameters(1), 4096)
    with pytest.raises(ValueError, match="budget must be at least one page \\(4,096 bytes\\), found 100"):
        smaller.budget = 100  # before there are pages
    assert smaller.budget == 4096
    with pytest.raises(ValueError, match="multiple of 4096"):
        optimizer = optim.PagedAdamW(params := parameters(1), page_bytes=5000, budget=5000)
        step(optimizer, params, 0)


def test_auto_keeps_all_where_memory_is_free():
    params = parameters(6)
    optimizer = paged(params, "auto")
    step(optimizer, params, 0)
    assert optimizer.budget is None and optimizer.paging().paged == 0


def test_auto_leaves_when_memory_is_short():
    pages = ops.extension.PagedState("lion", PAGE, 64 * PAGE, "/tmp")
    data = torch.arange(16 * PAGE // 4, dtype=torch.float32)
    slot = pages.allocate(data.numel())
    pages.write(slot, 0, data.data_ptr(), data.nbytes)
    assert pages.pages == 16 and pages.resident_bytes == 16 * PAGE
    pages.balance(1 << 60)  # more than there is
    assert pages.resident_bytes == PAGE and pages.budget == PAGE
    found = torch.zeros_like(data)
    pages.read(slot, 0, found.data_ptr(), found.nbytes)
    assert torch.equal(found, data)


def test_memory_of_another_size_is_refused():
    pages = ops.extension.PagedState("lion", PAGE, 4 * PAGE, "/tmp")
    slot, data = pages.allocate(300), torch.zeros(300)
    for copy in (pages.read, pages.write):
        with pytest.raises(ValueError, match="plane 0 of slot 0 has 2048 bytes, the memory 1200"):
            copy(slot, 0, data.data_ptr(), data.nbytes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [0, 0]}, "slot 0 is given for two parameters"),
        ({"slots": [1, 0]}, "slot 1 has the state of 300 elements, its parameter has 200"),
        ({"slots": [0, 2]}, "slot 2 of 2"),
        ({"slots": [0]}, "2 params need as many slots"),
        ({"rule": "momentum", "scalars": [1.0] * 6}, "the state in these pages is of another rule"),
        ({"state": 2**40}, "no paged state has the number"),
        ({"sweep": -1}, "sweep must not be negative"),
    ],
)
def test_state_of_others_is_refused_before_it_is_read(change, message):
    pages = ops.extension.PagedState("lion", PAGE, 64 * PAGE, "/tmp")
    params = [torch.ones(200), torch.ones(300)]
    call = {
        "params": params,
        "grads": [torch.ones_like(p) for p in params],
        "state": pages.number,
        "slots": [pages.allocate(p.numel()) for p in params],
        "sweep": 0,
        "rule": "lion",
        "scalars": [1.0] * 5,
        "steps": [1],
        "rows": [0, 0],
    }
    with pytest.raises(ValueError, match=message):
        optim_step_paged_(**{**call, **change})
    assert all(p.eq(1).all() for p in params)
    optim_step_paged_(**call)
    assert all(p.eq(2).all() for p in params)
