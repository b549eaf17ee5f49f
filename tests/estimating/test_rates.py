"""Seconds of operators by rates made by hand, and measured rates written to a file."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

import peftcore
from peftcore import ops
from peftcore.estimating import costs, overhead, rates
from peftcore.estimating.costs import Cost
from peftcore.estimating.devices import Device
from peftcore.estimating.following import Operation
from peftcore.estimating.overhead import OUTER, PLAIN, TRANSPOSED
from peftcore.ops.dense_linear import FASTER

HALVES, SINGLES = ((8, 10.0), (512, 1000.0)), ((8, 1.0), (512, 100.0))
MADE = rates.Rates(
    products={
        "half": {PLAIN: ((8, 10.0), (512, 20.0)), TRANSPOSED: HALVES, OUTER: HALVES},
        "single": dict.fromkeys((PLAIN, TRANSPOSED, OUTER), SINGLES),
    },
    dense={"half": (500.0, 80.0), "single": (100.0, 50.0)},
    low_rank={"half": (20.0, 10.0), "single": (4.0, 2.0)},
    attention={"half": (50.0, 40.0), "single": (5.0, 4.0)},
    fused={"half": (100.0, 80.0), "single": (10.0, 8.0)},
    packed={"half": (2.0, 200.0), "single": (3.0, 100.0)},
    elements={"half": {"aten::add": 0.5}, "single": {"aten::add": 1.0, "aten::gelu": 4.0, "peftcore::gated": 3.0}},
    bandwidth=((64, 32.0), (1024, 8.0)),
    fresh=0.25,
    calls={"forward": 0.125, "backward": 0.0625, "ours": 0.5},
)
MOVES = {"moved": 64, "elements": 2}


def of(name: str, cost: Cost | None = None, phase: str = "forward", **more: int) -> Operation:
    found = Operation(name, "", phase, **{**MOVES, **more})
    return found if cost is None else replace(found, cost=cost)


@pytest.mark.parametrize(
    ("operation", "seconds"),
    [
        (Operation("aten::view", "", "forward"), 0.125),  # a call and nothing else
        (of("aten::add"), 2.0 + 0.125),  # as fast as from the cache
        (of("aten::add_"), 2.0 + 0.125),
        (of("aten::any_other"), 2.0 + 0.125),
        (of("aten::gelu"), 8.0 + 0.125),
        (of("aten::add", moved=4096), 512.0 + 0.125),  # from memory
        (of("aten::add", moved=256), 16.0 + 0.125),  # half of the way from 32 to 8 bytes a second, in logarithms
        (of("aten::mm", Cost(1000.0, narrow=512)), 10.0 + 0.125),
        (of("aten::mm", Cost(1000.0, narrow=64)), 100.0 + 0.125),
        (of("aten::mm", Cost(1000.0, narrow=4), "backward"), 1000.0 + 0.0625),
        (of("aten::attention", Cost(1000.0)), 200.0 + 0.125),
        (of("aten::attention_backward", Cost(1000.0), "backward"), 250.0 + 0.0625),
        (of("aten::attention", Cost(1000.0, masked=500.0)), 300.0 + 0.125),
        (of("peftcore::attention", Cost(1000.0)), 100.0 + 0.5),
        (of("peftcore::attention_backward", Cost(1000.0), "backward"), 125.0 + 0.5),
        (of("peftcore::gated"), 6.0 + 0.5),
        (of("aten::mm", Cost(102400.0, narrow=512), moved=4096), 1024.0 + (512.0 - 128.0) + 0.125),  # W is not cached
        (of("peftcore::linear", Cost(1100.0, narrow=512, low_rank=(100.0, 8))), 10.0 + 100.0 / 4 + 0.5),
        (of("peftcore::linear", Cost(1100.0, narrow=512, low_rank=(100.0, 8)), "backward"), 20.0 + 100.0 / 2 + 0.5),
        (of("peftcore::linear_4bit", Cost(1100.0, narrow=512, unpacked=7, low_rank=(100.0, 8))), 131.0 + 0.5),
        (of("peftcore::linear_4bit", Cost(1000.0, narrow=512, unpacked=7)), 10.0 + 21.0 + 0.5),
    ],
)
def test_seconds_of_an_operator(operation: Operation, seconds: float) -> None:
    assert MADE.seconds(operation) == pytest.approx(seconds)


def test_type_forwards_that_run_again_and_those_that_stand_for_others() -> None:
    product = of("aten::mm", Cost(1000.0, narrow=512), "backward")
    assert MADE.seconds(replace(product, recomputed=True)) == pytest.approx(10.125)
    assert MADE.seconds(replace(product, halves=True, moved=8)) == pytest.approx(1.0625)
    assert MADE.seconds(replace(product, times=3.0)) == pytest.approx(3 * 10.0625)


def test_a_dtype_without_instructions_is_slow_by_how_the_matrices_lie() -> None:
    """dy W of 16 bits in a loop of PyTorch's, and by peftcore's own operator."""
    product = replace(of("aten::mm", Cost(1000.0, narrow=512, product=(512, 512, 512, PLAIN))), halves=True)
    assert MADE.seconds(product) == pytest.approx(1000 / 20 + 0.125)
    transposed = replace(product, cost=Cost(1000.0, narrow=512, product=(512, 512, 512, TRANSPOSED)), moved=8)
    assert MADE.seconds(transposed) == pytest.approx(1000 / 1000 + 0.125)
    ours = replace(product, name="peftcore::lora_linear_backward", phase="backward")
    assert MADE.seconds(ours) == pytest.approx(1000 / 80 + 0.5)
    narrow = replace(ours, cost=Cost(1000.0, narrow=8, product=(512, 8, 512, PLAIN)))
    assert MADE.seconds(narrow) == pytest.approx(1000 / (10 * 80 / 20) + 0.5)


def test_an_output_head_of_peftcore_s_is_a_product() -> None:
    x, weight = torch.empty(2, 3, 8), torch.empty(20, 8)
    found = costs.cost(torch.ops.peftcore.dense_linear.default, (x, weight), x @ weight.T, overhead.NONE)
    assert found == Cost(2 * 6 * 20 * 8, narrow=6)
    operation = Operation("peftcore::dense_linear", "", "forward", found._replace(narrow=512), moved=8, halves=True)
    assert MADE.seconds(operation) == pytest.approx(1920 / 500 + 0.5)


@pytest.mark.parametrize(("keys", "torch_share", "share"), [(64, 1.0, 1.0), (128, 1.0, 0.75), (1024, 0.75, 0.53125)])
def test_causal_attention_computes_whole_blocks(keys: int, torch_share: float, share: float) -> None:
    """Of 512 keys in PyTorch, of 64 in peftcore; the operations that are reported are half of all."""
    q = torch.empty(1, 2, keys, 8, device="meta")
    whole = 4.0 * 2 * keys * keys * 8
    theirs = costs.cost(
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, (q, q, q, 0.0, True), q, overhead.NONE
    )
    mine = costs.cost(torch.ops.peftcore.attention.default, (q, q, q, None, True, 0.1), q, overhead.NONE)
    assert theirs.flops == mine.flops == whole / 2
    assert (theirs.flops + theirs.masked, mine.flops + mine.masked) == (torch_share * whole, share * whole)
    assert costs.cost(torch.ops.peftcore.attention.default, (q, q, q, None, False, 0.1), q, overhead.NONE).masked == 0


@pytest.mark.skipif(torch.float32 not in FASTER, reason="PyTorch multiplies fp32 as fast")
def test_the_head_of_a_loss_without_logits_is_multiplied_by_peftcore() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1, vocab_size=96
    )
    found = peftcore.estimate(config, "lora", batch_size=2, length=16, lazy_logits=True)
    assert sum(operation.name == "peftcore::dense_linear" for operation in found.operations) == 2


def test_frozen_weights_are_widened_where_the_processor_does_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors PyTorch's product represents the operator that a CPU takes."""
    mm, x = torch.ops.aten.mm.default, torch.empty(6, 8, dtype=torch.bfloat16, device="meta")
    frozen = torch.empty(20, 8, dtype=torch.bfloat16, device="meta")
    trained = frozen.clone().requires_grad_()

    def widened(left: torch.Tensor, right: torch.Tensor) -> bool:
        return costs.cost(mm, (left, right), left @ right, overhead.NONE).widened

    monkeypatch.setattr(ops, "WIDENED", frozenset())
    assert not widened(x, frozen.t())
    monkeypatch.setattr(ops, "WIDENED", frozenset({torch.bfloat16}))
    assert widened(x, frozen.t()) and widened(x.new_empty(6, 20), frozen)
    assert not widened(x, trained.t()) and not widened(x.t(), x) and not widened(x.float(), frozen.float().t())
    product = of(
        "aten::mm", Cost(1000.0, narrow=512, product=(512, 512, 512, PLAIN), widened=True), "backward", moved=8
    )
    assert MADE.seconds(replace(product, halves=True)) == pytest.approx(1000 / 80 + 0.0625)


def test_a_slow_call_is_not_run_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def call() -> None:
        nonlocal now, calls
        now, calls = now + 1.0 / (calls + 1), calls + 1

    monkeypatch.setattr(rates.time, "perf_counter", lambda: now)
    assert rates.fastest(call, 0.03) == pytest.approx(0.5) and calls == 2
    calls = 20
    assert rates.fastest(call, 0.03) == pytest.approx(1 / 23) and calls == 23


def test_a_step_pays_for_its_pages() -> None:
    assert Device("here", 1.0, MADE).seconds([of("aten::add")] * 2, fresh=8) == pytest.approx(2 * 2.125 + 2.0)


def test_what_is_measured_is_kept_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def once(call: Callable[[], object], seconds: float = 0.0) -> float:
        nonlocal count
        count += 1
        call()
        return 1e-3 * count  # no two alike

    monkeypatch.setattr(rates, "fastest", once)
    state = torch.get_rng_state()
    found = rates.measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert rates.read(json.loads(json.dumps(found._asdict()))) == found
    assert {*found.products, *found.elements, *found.fused, *found.low_rank} == {"half", "single"} and count > 80


@pytest.mark.parametrize(
    "kept",
    [
        {"half": 1.0, "single": 2.0, "bandwidth": 3.0, "call": 4.0},  # as they once were
        {**MADE._asdict(), "products": {"half": ()}},
        {**MADE._asdict(), "products": {"half": HALVES, "single": SINGLES}},  # of all layouts in one
        {**MADE._asdict(), "calls": {"forward": 1.0}},
        {**MADE._asdict(), "bandwidth": ((1, "fast"),)},
    ],
)
def test_others_are_refused(kept: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        rates.read(kept)
