"""The memory of a step as it goes: which samples are kept, and where in the step they lie."""

from peftcore_cli.training.memory_trace import MemoryTrace, Trace
from torch import nn


def step(trace: MemoryTrace, model: nn.Module, batches: int) -> None:
    trace.on_step_begin()
    for batch in range(batches):
        model(1)
        if batch + 1 < batches:
            trace.on_substep_end()
    trace.on_pre_optimizer_step()
    trace.on_step_end()


def test_keeps_the_largest_step_but_the_first() -> None:
    model = nn.Identity().train()
    watched = MemoryTrace(model, lambda: sizes.pop(0))
    sizes = [9, 9, 9, 5, 7, 5, 4, 4, 4]
    for _ in range(3):
        step(watched, model, 1)
    assert watched.largest is not None and watched.largest.peak == 7
    model.eval()(1)  # is no step
    watched.close()
    model.train()(1)
    assert not sizes


def test_samples_lie_in_their_phases() -> None:
    found = Trace(samples=[(0.5, 1), (1.0, 2), (3.0, 3), (4.5, 4)], ends=[0.0, 1.0, 4.0, 5.0])
    assert found.by_phase(3) == [(0.5, 1), (1.0, 2), (1.0, 2), (1 + 2 / 3, 3), (2.5, 4)]
    assert found.by_phase(4) == []  # of a step with fewer batches than were predicted


def test_of_many_batches_the_first_and_the_last_ones() -> None:
    ends = [float(n) for n in range(10)]  # four batches and the optimizer
    found = Trace(samples=[(n + 0.5, n) for n in range(9)], ends=ends)
    assert found.by_phase(5) == [(0.5, 0), (1.5, 1), (2.5, 6), (3.5, 7), (4.5, 8)]
