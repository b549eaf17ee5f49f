"""State that is loaded, in tensors and in pages: what does not fit leaves what was there."""

import pytest
import torch
from support.paged_optimizers import PAGE, paged, pages_of, parameters, step

from peftcore import ops, optim

pytestmark = pytest.mark.skipif(ops.extension is None, reason="no _C")


@pytest.mark.parametrize("kind", [optim.PagedAdamW, optim.PagedAdamW8bit])
@pytest.mark.parametrize("count", [5000, 100])
def test_a_parameter_that_changed_its_size_does_not_write_into_anothers_state(kind, count):
    params = parameters(3)
    optimizer = paged(params, 4 * PAGE, kind)
    step(optimizer, params, 0)
    before = {name: value.clone() for name, value in optimizer._get_state(params[1]).items()}
    params[0].data = torch.randn(count)
    with pytest.raises(
        RuntimeError, match=rf"had 200 elements on cpu when its state was created, and now has {count:,}"
    ):
        step(optimizer, params, 1)
    assert all(torch.equal(value, before[name]) for name, value in optimizer._get_state(params[1]).items())
    with pytest.raises(RuntimeError, match="Create a new optimizer"):
        optimizer.state_dict()


KINDS = [(optim.PagedAdamW, optim.AdamW), (optim.PagedAdamW8bit, optim.AdamW8bit)]
KINDS += [(optim.AdamW, optim.PagedAdamW), (optim.AdamW8bit, optim.PagedAdamW8bit)]


def _shorter(state):
    name = next(name for name in ("exp_avg_absmax", "exp_avg") if name in state)
    state[name] = state[name][:-1]


def _without_scales(state):
    kept = {name: value for name, value in state.items() if name != "exp_avg_absmax"}
    return {**kept, "exp_avg": torch.zeros(200, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda saved: _shorter(saved["state"][2]),
            "the saved state of parameter 2 does not match the parameter: saved 'exp_avg",
        ),
        (
            lambda saved: saved["state"][1].pop("exp_avg_sq"),
            "parameter 1 does not match the parameter: .* has no tensor 'exp_avg_sq'",
        ),
        (
            lambda saved: saved["state"][0].update(exp_avg=3.0),
            "parameter 0 does not match the parameter: .* has no tensor 'exp_avg'",
        ),
        (
            lambda saved: saved["state"][0].update(exp_avg=saved["state"][0]["exp_avg"].view(10, 20)),
            r"0 does not match the parameter: saved 'exp_avg' has shape \[10, 20\], but the parameter has \[200\]",
        ),
        (
            lambda saved: saved["state"].update({0: _without_scales(saved["state"][0])}),
            r"0 does not match the parameter: saved 'exp_avg' is torch.uint8, but the state has no 'exp_avg_absmax'",
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
    pages = pages_of(optimizer)
    saved = optimizer.state_dict()
    for _ in range(5):
        optimizer.load_state_dict(saved)
    assert pages_of(optimizer) == pages
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
