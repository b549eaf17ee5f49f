"""The optimizer's CUDA kernels on the emulator, against the operators on CPU: equal bits for every rule and dtype."""

import ctypes

import pytest
import torch
from hypothesis import given, settings, strategies as st

from peftcore import ops
from peftcore.ops import dynamic8, optim_rules as rules

RULES = list(rules.RULES)  # in the order of csrc/optim/rules.h
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Segment(ctypes.Structure):
    _fields_ = (
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("state", ctypes.c_void_p * 4),
        ("count", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("stream", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("row", ctypes.c_int32),
        ("param_dtype", ctypes.c_int),
        ("grad_dtype", ctypes.c_int),
    )


def encoder(signed):
    """The encoder's tables as csrc/optim/dynamic8.h lays them out, in fp32 (base as int32)."""
    begin, slope, parts = dynamic8.ENCODERS[signed]
    threshold, rows = torch.full((16,), torch.inf), torch.zeros(2, 16, dtype=torch.long)
    for exponent in range(16):
        low, high = 2.0 ** (2 * exponent - 31), 2.0 ** (2 * exponent - 29)
        rows[:, exponent] = region = int((begin < low).sum())
        if region < 8 and begin[region] < high:
            threshold[exponent] = begin[region]
            rows[1, exponent] += 1
    return torch.cat([threshold, slope[rows.flatten()], parts[rows.flatten()]])


MAPS = torch.cat([dynamic8.SIGNED_MAP, encoder(True), dynamic8.UNSIGNED_MAP, encoder(False)])


def scalars(rule, step):
    if rule == "lion":
        return rules.LionScalars.from_options(1e-2, (0.9, 0.99), 0.1, -1.0)
    if rule == "momentum":
        return rules.MomentumScalars.from_options(step, 1e-2, 0.9, 0.1, 0.1, True)
    return rules.RULES[rule].scalars.from_options(step, 1e-2, (0.9, 0.999), 1e-8, 0.1)._replace(factor=0.3)


def cuda_step(emulated, params, grads, state, rule, table_rows, steps, rows, streams, seed):
    planes, count = len(rules.RULES[rule].planes), len(params)
    table = (Segment * count)()
    first_block = [0]
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        pointers = [state[plane * count + i].data_ptr() for plane in range(planes)] + [0] * (4 - planes)
        stream = streams[i] if streams else -1
        dtypes = DTYPES.index(p.dtype), DTYPES.index(g.dtype)
        own = (p.numel(), 0, stream, steps[rows[i]], rows[i], *dtypes)
        table[i] = Segment(p.data_ptr(), g.data_ptr(), (ctypes.c_void_p * 4)(*pointers), *own)
        first_block.append(first_block[-1] + dynamic8.block_count(p.numel()))
    blocks = torch.tensor(first_block)
    launch = emulated("peftcore_optim_step")
    launch(
        RULES.index(rule),
        ctypes.byref(table),
        blocks,
        count,
        ctypes.c_int64(first_block[-1]),
        torch.tensor([[*row, *[0.0] * (8 - len(row))] for row in table_rows]),
        MAPS,
        seed=seed,
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 700), min_size=1, max_size=5),
    rule=st.sampled_from(RULES),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    stochastic=st.booleans(),
    offset=st.integers(0, 1),
    seed=st.integers(0, 10**6),
)
def test_step(emulated, counts, rule, dtypes, stochastic, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(n + offset, generator=generator).to(dtypes[0])[offset:] for n in counts]
    state = [plane.new(p) for plane in rules.RULES[rule].planes for p in params]
    others, other_state = [p.clone() for p in params], [t.clone() for t in state]
    rows = [i % 2 for i in range(len(counts))]
    streams = [seed + i for i in range(len(counts))] if stochastic else []
    for step in (1, 2, 3):
        grads = [torch.randn(n, generator=generator).to(dtypes[1]) for n in counts]
        table, steps = [scalars(rule, step), scalars(rule, step + 4)], [step, step + 4]
        cuda_step(emulated, params, grads, state, rule, table, steps, rows, streams, seed + step)
        ops.optim_step_(others, grads, other_state, rule, table[0] + table[1], steps, rows, streams)
    for found, wanted in zip([*params, *state], [*others, *other_state], strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("rule", ["lion", pytest.param("adamw_8bit", marks=pytest.mark.nightly)])
def test_more_blocks_than_the_launch_has_warps(emulated, rule):
    count = 8 * 1056 + 40  # cuda_tuning.cu: the warps of the largest grid
    sizes = [300 if i % 1000 == 0 else 1 + i % 3 for i in range(count)]
    flat = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1))
    params, others = list(flat.clone().split(sizes)), list(flat.clone().split(sizes))
    grads, row = list(flat.flip(0).split(sizes)), scalars(rule, 1)
    state, other_state = ([plane.new(p) for plane in rules.RULES[rule].planes for p in params] for _ in range(2))
    cuda_step(emulated, params, grads, state, rule, [row], [1], [0] * count, [], 3)
    ops.optim_step_(others, grads, other_state, rule, row, [1], [0] * count, [])
    assert torch.equal(torch.cat(params), torch.cat(others))
    assert torch.equal(torch.cat(state), torch.cat(other_state))


def test_every_order_of_threads_gives_the_same_bits(emulated):
    results = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(5)
        p, g = torch.randn(600, generator=generator), torch.randn(600, generator=generator)
        state = rules.RULES["adamw_8bit"].new_state(p)
        for step in (1, 2):
            row = scalars("adamw_8bit", step)
            cuda_step(emulated, [p], [g], state, "adamw_8bit", [row], [step], [0], [], seed)
        results.append([p, *state])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_to_do(emulated):
    nothing = torch.empty(0)
    cuda_step(emulated, [nothing], [nothing], [nothing, nothing], "adamw", [scalars("adamw", 1)], [1], [0], [], 0)


def test_an_unknown_rule(emulated):
    with pytest.raises(RuntimeError, match="unknown rule"):
        emulated("peftcore_optim_step")(9, None, None, 0, ctypes.c_int64(1), None, None)


@pytest.mark.nightly
def test_stays_within_its_memory(sanitized):
    done = sanitized("optim", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout
