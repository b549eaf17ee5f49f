"""The optimizer step: torch's and bitsandbytes' arithmetic, the same bits on every SIMD level, clear refusals."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import fresh_process

from peftcore import ops
from peftcore.ops import dynamic8, optim, optim_rules as rules

RULES = list(rules.RULES)
needs_extension = pytest.mark.skipif(ops.extension is None, reason="no _C")


@pytest.fixture(params=ops.extension.cpu_levels() if ops.extension else ["reference"])
def level(request):
    if ops.extension is None:
        yield request.param
        return
    before = ops.extension.cpu_level()
    ops.extension.set_cpu_level(request.param)
    yield request.param
    ops.extension.set_cpu_level(before)


def scalars(rule, step=3, lr=1e-2):
    if rule == "lion":
        return rules.LionScalars.from_options(lr, (0.9, 0.99), 0.1)
    if rule == "momentum":
        return rules.MomentumScalars.from_options(step, lr, 0.9, 0.1, 0.1, True)
    return rules.RULES[rule].scalars.from_options(step, lr, (0.9, 0.999), 1e-8, 0.1)._replace(factor=0.3)


def state_of(rule, counts):
    """Fresh state, plane by plane."""
    return [plane.new(torch.empty(n)) for plane in rules.RULES[rule].planes for n in counts]


def test_maps_are_those_of_bitsandbytes_and_are_read_by_the_kernels(bnb):
    assert torch.equal(dynamic8.SIGNED_MAP, bnb.create_dynamic_map(True))
    assert torch.equal(dynamic8.UNSIGNED_MAP, bnb.create_dynamic_map(False))
    codes, one, g = torch.arange(256, dtype=torch.uint8), torch.ones(1), torch.zeros(256)
    # A row that keeps both moments and makes p = -m / (sqrt(v) + eps).
    p, none = torch.ones(256), torch.zeros(256, dtype=torch.uint8)
    ops.optim_step_([p], [g], [codes.clone(), none, one.clone(), one.clone()], "adamw_8bit",
                    [1, 0, 0, 1, 0, -1, 1], [1], [0])  # fmt: skip
    assert torch.equal(p, -dynamic8.SIGNED_MAP)
    p, full = torch.ones(256), torch.full((256,), 255, dtype=torch.uint8)
    ops.optim_step_([p], [g], [full, codes.clone(), one.clone(), one.clone()], "adamw_8bit",
                    [1, 0, 0, 1, 0, -1, 0], [1], [0])  # fmt: skip
    assert torch.equal(p, -1 / dynamic8.UNSIGNED_MAP.double().sqrt().float())


@pytest.mark.parametrize("table", [dynamic8.SIGNED_MAP, dynamic8.UNSIGNED_MAP], ids=["signed", "unsigned"])
def test_codes_are_the_nearest(table):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20 * 256, generator=generator) * 10 ** (torch.randn(20 * 256, generator=generator) * 2)
    if table is dynamic8.UNSIGNED_MAP:
        x = x.abs()
    codes, absmax = dynamic8.encode(x, table)
    scaled = (x.view(-1, 256) / absmax[:, None]).flatten().double()
    distance = (scaled[:, None] - table.double()).abs()
    found, best = distance.gather(1, codes.long()[:, None])[:, 0], distance.min(1).values
    tiny = (scaled < table[1] / 2) & (scaled > 0) & (table is dynamic8.UNSIGNED_MAP)
    assert (found <= best * (1 + 1e-5) + 1e-9)[~tiny].all()
    assert (codes[tiny] == 1).all()  # a second moment above 0 is never stored as 0
    assert torch.equal(dynamic8.encode(table * 3, table)[0].int(), torch.arange(256).int())


@needs_extension
@pytest.mark.parametrize("rule", RULES)
def test_every_level_gives_the_bits_of_the_reference(level, rule):
    generator = torch.Generator().manual_seed(1)
    counts = [1, 255, 256, 700, 5000]
    params = [torch.randn(n, generator=generator) for n in counts]
    state = state_of(rule, counts)
    others, other_state = [p.clone() for p in params], [t.clone() for t in state]
    for step in range(1, 12):
        grads = [torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator) for n in counts]
        grads[3][:300] = 0
        row = scalars(rule, step)
        ops.optim_step_(params, grads, state, rule, row, [step], [0] * 5)
        optim.optim_step_reference(others, grads, other_state, rule, row, [step], [0] * 5)
    for found, wanted in zip([*params, *state], [*others, *other_state], strict=True):
        assert torch.equal(found, wanted)


@needs_extension
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 900), min_size=1, max_size=6),
    rule=st.sampled_from(RULES),
    dtypes=st.tuples(st.sampled_from(optim.DTYPES), st.sampled_from(optim.DTYPES)),
    stochastic=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_dtypes_shapes_and_rows(counts, rule, dtypes, stochastic, seed):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(n, generator=generator).to(dtypes[0]) for n in counts]
    state, rows = state_of(rule, counts), [i % 2 for i in range(len(counts))]
    streams = [seed * 2**32 + i for i in range(len(counts))] if stochastic else []
    others, other_state = [p.clone() for p in params], [t.clone() for t in state]
    for step in (1, 2):
        grads = [torch.randn(n, generator=generator).to(dtypes[1]) for n in counts]
        table = scalars(rule, step) + scalars(rule, step + 5, 3e-2)
        ops.optim_step_(params, grads, state, rule, table, [step, step + 5], rows, streams)
        optim.optim_step_reference(others, grads, other_state, rule, table, [step, step + 5], rows, streams)
    for found, wanted in zip([*params, *state], [*others, *other_state], strict=True):
        assert torch.equal(found, wanted)


@needs_extension
@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_results_between_two_values_are_rounded_to_the_even_one(level, dtype, ulp):
    """Random values meet no such tie."""
    p = (1 + ulp * torch.arange(40)).to(dtype)
    wanted = (p.double() + ulp / 2).to(dtype)
    assert (wanted != p).sum() == 20
    lion = rules.LionScalars(factor=1, decay=1, weight1=1, weight2=1, step=ulp / 2)
    ops.optim_step_([p], [torch.ones(40)], [torch.zeros(40)], "lion", lion, [1], [0])
    assert torch.equal(p, wanted)


@needs_extension
@pytest.mark.parametrize("rule", RULES)
def test_all_levels_give_the_same_bits(rule):
    results = []
    for name in ops.extension.cpu_levels():
        before = ops.extension.cpu_level()
        ops.extension.set_cpu_level(name)
        generator = torch.Generator().manual_seed(2)
        counts = [3, 256, 3000]
        params, state = [torch.randn(n, generator=generator) for n in counts], state_of(rule, counts)
        for step in range(1, 20):
            grads = [torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator) for n in counts]
            ops.optim_step_(params, grads, state, rule, scalars(rule, step), [step], [0] * 3)
        ops.extension.set_cpu_level(before)
        results.append([*params, *state])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0 + 2**-12, -0.3, 3e-6, 65519.0])
def test_stochastic_rounding_is_right_on_average(dtype, value):
    x = torch.full((40_000,), value)
    rounded = torch.cat([optim.round_stochastic(x, dtype, 5, step) for step in range(4)]).double()
    spacing = (rounded.max() - rounded.min()).item()
    assert len(rounded.unique()) <= 2
    assert abs(rounded.mean().item() - value) <= 5 * spacing / math.sqrt(rounded.numel())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e25])
@pytest.mark.parametrize("rule", ["adamw", "adamw_8bit"])
def test_a_gradient_that_is_not_finite_spoils_its_own_element_alone(level, rule, value):
    """1e25 is finite, its square is not: the parameter stays where it is."""
    generator = torch.Generator().manual_seed(0)
    p, state = torch.ones(600), state_of(rule, [600])
    others, others_state = torch.ones(600), state_of(rule, [600])
    for step in range(1, 5):
        g = torch.randn(600, generator=generator)
        g[300] = 0
        bad = g.clone()
        bad[300] = value if step == 2 else 0
        ops.optim_step_([p], [bad], state, rule, scalars(rule, step), [step], [0])
        ops.optim_step_([others], [g], others_state, rule, scalars(rule, step), [step], [0])
    spoiled = ~p.isfinite()
    assert spoiled.nonzero().flatten().tolist() == ([300] if abs(value) != 1e25 else [])
    p[300] = others[300]
    assert torch.equal(p, others)


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule):
    params, grads, state = [torch.randn(300)], [torch.randn(300)], state_of(rule, [300])
    torch.library.opcheck(ops.optim_step_, (params, grads, state, rule, scalars(rule), [3], [0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": [torch.ones(4, dtype=torch.double)]}, TypeError, "params must be float32, float16 or bfloat16"),
        ({"grads": []}, ValueError, "grads"),
        ({"state": [torch.zeros(4)]}, ValueError, "state"),
        ({"state": [torch.zeros(4), torch.zeros(5)]}, ValueError, "state"),
        ({"state": [torch.zeros(4), torch.zeros(4, dtype=torch.half)]}, TypeError, "state must be"),
        ({"rule": "adam"}, ValueError, "no rule 'adam'"),
        ({"scalars": [1.0]}, ValueError, "scalars"),
        ({"rows": [0, 0]}, ValueError, "rows"),
        ({"rows": [-1]}, ValueError, "row -1 of 1"),
        ({"rows": [1]}, ValueError, "row 1 of 1"),
        ({"grads": [torch.ones(1)]}, ValueError, r"a gradient of shape \[1\] for a parameter of shape \[4\]"),
        ({"streams": [1, 2]}, ValueError, "streams"),
    ],
)
def test_bad_arguments(change, error, message):
    call = {
        "params": [torch.ones(4)],
        "grads": [torch.ones(4)],
        "state": [torch.zeros(4), torch.zeros(4)],
        "rule": "adamw",
        "scalars": scalars("adamw"),
        "steps": [1],
        "rows": [0],
        "streams": [],
    }
    for step in (ops.optim_step_, optim.optim_step_reference):
        with pytest.raises(error, match=message):
            step(*{**call, **change}.values())


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "no kernel has the rule 'adam'"),
        ({"scalars": "factor, decay, weight2, weight1, step"}, "reads the scalars factor, decay, weight1, weight2"),
        ({"planes": [("float32", 1), ("float32", 1)]}, "reads other planes"),
        ({"planes": [("uint8", 1)]}, "reads other planes"),
        ({"planes": [("float32", 256)]}, "reads other planes"),
    ],
)
def test_a_table_that_kernels_would_read_otherwise_is_refused(change, message):
    lion = {"name": "lion", "planes": [("float32", 1)], "scalars": "factor, decay, weight1, weight2, step"}
    ops.extension.define_optim_rule(**lion)  # as it is
    with pytest.raises(ValueError, match=message):
        ops.extension.define_optim_rule(**{**lion, **change})


@pytest.mark.parametrize("moved", ["grads", "state"])
def test_a_meta_tensor_among_others_is_refused(moved):
    """PyTorch calls the operator's fake for it, and the step would change nothing."""
    p = torch.ones(300)
    call = {"params": [p], "grads": [torch.ones(300)], "state": [torch.zeros(300), torch.zeros(300)]}
    call[moved][-1] = call[moved][-1].to("meta")
    with pytest.raises(ValueError, match=f"optim_step_: {moved} must be on cpu, found meta"):
        ops.optim_step_(*call.values(), "adamw", [1.0] * 8, [1], [0])
    assert torch.equal(p, torch.ones(300))


@pytest.mark.slow
@pytest.mark.skipif(ops.extension is None, reason="no _C: PyTorch's own operators check")
def test_state_on_another_device_is_refused_before_it_is_read():
    """As CPU state is beside parameters on a card. A process of its own, since reading it is a crash."""
    code = """
import torch
from peftcore import ops
p = torch.ones(300)
state = [torch.zeros(300, device="meta"), torch.zeros(300, device="meta")]
try:
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    ops.optim_step_.redispatch(cpu, [p], [p], state, "adamw", [1.0] * 8, [1], [0])
except ValueError as error:
    print(error)
"""
    done = fresh_process.run(code)
    assert done.stdout.strip() == "optim_step_: state must be on cpu, found meta", done.stderr[-500:]
