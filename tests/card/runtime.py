"""Operators in what PyTorch runs around them: graphs, streams, threads, torch.compile and autocast. Equal bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from card.checks import check, frozen, same
from card.streams import captured, new_stream
from card.table import Place, Skip, cases
from peftcore import ops, optim
from peftcore.ops import keep_mask
from peftcore.ops.optim_rules import LionScalars

OUT, WIDTH = 640, 2048


class Call(NamedTuple):
    """A call that reads `source`, which may change between calls."""

    source: Tensor
    run: Callable[[], list[Tensor]]


def lora(place: Place, rows: int, kind: str, rank: int = 16, seed: int = 1) -> Call:
    weight, _ = frozen(place, (OUT, WIDTH), kind, torch.bfloat16)
    operands = ([weight], []) if kind == "dense" else weight.operands()
    x = place.normal(rows, WIDTH, seed=seed, dtype=torch.bfloat16)
    grad = place.normal(rows, OUT, seed=seed + 1, dtype=torch.bfloat16)
    a, b = place.normal(rank, WIDTH, seed=3) / WIDTH**0.5, place.normal(OUT, rank, seed=5)

    def run() -> list[Tensor]:
        y, s = torch.ops.peftcore.lora_linear(x, *operands, None, a, b, 1.5)
        return [y, s, *torch.ops.peftcore.lora_linear_backward(grad, x, s, *operands, a, b, [True] * 3, 1.5)]

    return Call(x, run)


def linear(place: Place, rows: int, kind: str) -> Call:
    weight, _ = frozen(place, (OUT, WIDTH), kind, torch.bfloat16)
    x = place.normal(rows, WIDTH, seed=1, dtype=torch.bfloat16)
    return Call(x, lambda: [ops.linear_4bit(x, weight)])


def experts(place: Place, rows: int, kind: str) -> Call:
    weight, _ = frozen(place, (8, 256, 512), kind, torch.bfloat16)
    operands = ([weight], []) if kind == "dense" else weight.operands()
    x, grad = (place.normal(rows, n, seed=n, dtype=torch.bfloat16) for n in (512, 256))
    offsets = torch.arange(1, 9, dtype=torch.int32, device=place.device) * (rows // 8)
    a, b = place.normal(8, 16, 512, seed=3) / 20, place.normal(8, 256, 16, seed=5)

    def run() -> list[Tensor]:
        y, s = torch.ops.peftcore.grouped_linear(x, offsets, *operands, None, [a, b], False, 1.5)
        arguments = grad, x, offsets, *operands, [a, b, s], False, [True] * 3, 1.5
        return [y, s, *torch.ops.peftcore.grouped_linear_backward(*arguments)]

    return Call(x, run)


def four_bits(place: Place, rows: int, kind: str) -> Call:
    x = place.normal(rows, 4096, seed=1, dtype=torch.bfloat16)
    book = ops.codebook("nf4", place.device)

    def run() -> list[Tensor]:
        codes, absmax = torch.ops.peftcore.quantize_4bit(x, book, 64)
        operands = ops.PackedWeight(codes, absmax, book, tuple(x.shape)).operands()
        return [codes, absmax, torch.ops.peftcore.dequantize_4bit(*operands, torch.bfloat16)]

    return Call(x, run)


def entropy(place: Place, rows: int, kind: str) -> Call:
    logits = place.normal(rows, 32000, seed=1, dtype=torch.bfloat16)
    labels = torch.arange(rows, device=place.device)

    def run() -> list[Tensor]:
        own = logits.clone()
        return [torch.ops.peftcore.cross_entropy_rows_(own, labels, None, None, [0.0, 1.0, 0.0, 0.0], -100, True), own]

    return Call(logits, run)


def norms(place: Place, rows: int, kind: str) -> Call:
    x, other = (place.normal(rows, WIDTH, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    weight = place.normal(WIDTH, seed=3, dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        y, scale = torch.ops.peftcore.rms_norm(x, weight, 1e-5, 0.0, True)
        gradients = torch.ops.peftcore.rms_norm_backward(other, x, weight, scale, 0.0, True, [True, True])
        product = torch.ops.peftcore.gated(x, other, 1.0, 0.0)
        return [y, *gradients, product, *torch.ops.peftcore.gated_backward(y, x, other, 1.0, 0.0)]

    return Call(x, run)


CALLS: dict[str, Callable[[Place], Call]] = {
    "one_launch": lambda place: lora(place, 1, "nested"),
    "split_columns": lambda place: lora(place, 16, "nested"),
    "clusters": lambda place: lora(place, 64, "nested"),
    "many_rows": lambda place: lora(place, 600, "nested"),
    "dense": lambda place: lora(place, 600, "dense", 64),
    "linear_4": lambda place: linear(place, 4, "nf4"),
    "linear_17": lambda place: linear(place, 17, "nested"),
    "experts_few": lambda place: experts(place, 16, "nested"),
    "experts_dense": lambda place: experts(place, 512, "dense"),
    "four_bits": lambda place: four_bits(place, 64, "nf4"),
    "entropy": lambda place: entropy(place, 64, "plain"),
    "norms": lambda place: norms(place, 600, "llama"),
}


def equal(found: list[Tensor], wanted: list[Tensor], when: str) -> None:
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        same(one, other, f"result {index} {when}")


# Kernels that `CALLS` launch, by the names that a profiler has for them.
LAUNCHED = (
    "quantize_kernel",
    "dequantize_kernel",
    "rows_kernel",
    "panel_kernel",
    "one_launch_kernel",
    "down_kernel",
    "up_kernel",
    "reduce_kernel",
    "copy_kernel",
    "sum_pair_kernel",
    "skinny_kernel",
)
# Of Triton, if it is installed.
LAUNCHED_BY_TRITON = (
    "_cross_entropy_kernel",
    "_rms_norm_kernel",
    "_rms_norm_dx_kernel",
    "_rms_norm_dweight_kernel",
    "_gated_kernel",
    "_gated_backward_kernel",
)


@cases()
def kernels_run_on_the_card(place: Place) -> str:
    """The profiler sees our kernels: operators did not fall back on their references, which compute the same."""
    from torch.profiler import ProfilerActivity, profile

    calls = [make(place) for make in CALLS.values()]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in calls:
            call.run()
        torch.cuda.synchronize()
    names = {event.key for event in profiler.key_averages()}
    if not names:
        raise Skip("PyTorch's profiler sees no kernels here")
    in_triton = LAUNCHED_BY_TRITON if find_spec("triton") else ()
    ours = {name for name in names if "peftcore" in name or name in in_triton}
    missing = [kernel for kernel in (*LAUNCHED, *in_triton) if not any(kernel in name for name in ours)]
    assert not missing, f"the profiler saw no {', '.join(missing)}: {sorted(ours) or 'no kernel of peftcore at all'}"
    return f"{len(ours)} kernels with their template arguments"


@cases(name=CALLS)
def capture_and_replay(place: Place, name: str) -> None:
    """Replays have the bits of calls, with new inputs and many times: counters are zero again after each launch."""
    if name.startswith("experts") and torch.cuda.get_device_capability() < (9, 0):
        raise Skip("PyTorch's product of experts waits for the device below compute capability 9.0")
    call = CALLS[name](place)
    before = call.source.clone()
    first = call.run()
    graph, results = captured(call.run)
    for number in range(5):
        call.source.copy_(before if number % 2 else before.flip(0) * 0.5)
        wanted = call.run()
        graph.replay()
        torch.cuda.synchronize()
        equal(results, wanted, f"of replay {number}")
    for _ in range(200):
        graph.replay()
    call.source.copy_(before)
    graph.replay()
    torch.cuda.synchronize()
    equal(results, first, "after 200 replays")


@cases()
def launches_on_the_current_stream(place: Place) -> None:
    """The kernels of a busy stream run behind its copies; on the default stream they would read old values.

    PyTorch's streams do not wait for the default stream, nor it for them, unlike those of `new_stream`.
    """
    weight, _ = frozen(place, (OUT, WIDTH), "nested", torch.bfloat16)
    values = place.normal(4, WIDTH, seed=1, dtype=torch.bfloat16)
    wanted, x = ops.linear_4bit(values, weight), torch.zeros_like(values)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        x.copy_(values)
        found = ops.linear_4bit(x, weight)
    torch.cuda.synchronize()
    same(found, wanted, "y")


@cases(name=CALLS)
def two_streams(place: Place, name: str) -> None:
    """Calls that overlap on two streams do not share counters or sums."""
    call = CALLS[name](place)
    wanted = call.run()
    torch.cuda.synchronize()
    streams, results = [new_stream(), new_stream()], []
    for number in range(60):
        with torch.cuda.stream(streams[number % 2]):
            results.append(call.run())
    torch.cuda.synchronize()
    for number, found in enumerate(results):
        equal(found, wanted, f"of call {number}")


@cases(name=CALLS)
def two_threads(place: Place, name: str) -> None:
    call = CALLS[name](place)
    wanted = call.run()
    torch.cuda.synchronize()
    found: list[list[Tensor]] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(new_stream()):
                mine = [call.run() for _ in range(20)]
                torch.cuda.current_stream().synchronize()
            found.extend(mine)
        except BaseException as error:  # reported by the thread that waits
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    for number, results in enumerate(found):
        equal(results, wanted, f"of call {number}")


@cases(kind=("dense", "nested"), rows=(1, 64), slow=True)
def cudagraph_trees(place: Place, kind: str, rows: int) -> str:
    """`torch.compile(mode="reduce-overhead")` replays a step with the values of an eager one."""
    weight, _ = frozen(place, (OUT, WIDTH), kind, torch.bfloat16)
    a, b = place.normal(16, WIDTH, seed=3) / WIDTH**0.5, place.normal(OUT, 16, seed=5)
    a.requires_grad_(), b.requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, None, a, b, 1.5).relu() * 2

    try:
        compiled = torch.compile(layer, mode="reduce-overhead")
        compiled(place.normal(rows, WIDTH, seed=0, dtype=torch.bfloat16))
    except (ImportError, torch._dynamo.exc.TorchDynamoException) as error:
        if "triton" in str(error).lower():
            raise Skip(f"torch.compile does not run here: {type(error).__name__}") from None
        raise
    for seed in range(5):
        x = place.normal(rows, WIDTH, seed=seed, dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        found = [y.detach().clone(), *torch.autograd.grad(y.float().sum(), [a, b])]
        wanted = layer(x)
        expected = [wanted.detach(), *torch.autograd.grad(wanted.float().sum(), [a, b])]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2.0**-6, atol=2.0**-6 * float(other.abs().max()))
    return "5 steps"


@cases(rows=(1, 20, 70), emulated=lambda rows: rows == 20)
def autocast(place: Place, rows: int) -> str:
    """Under autocast an fp32 x has the bits of the bf16 x, and gradients have the dtypes of their leaves."""
    weight, _ = frozen(place, (72, 320), "nested", torch.bfloat16)
    x = place.normal(rows, 320, seed=1).requires_grad_()
    a, b = (place.normal(8, 320, seed=3) / 18).requires_grad_(), place.normal(72, 8, seed=5).requires_grad_()
    with torch.autocast(place.device.type, torch.bfloat16):
        y = ops.lora_linear(x, weight, None, a, b, 1.5)
    half = x.detach().bfloat16()
    same(y.detach(), ops.lora_linear(half, weight, None, a.detach(), b.detach(), 1.5), "y")
    gradients = torch.autograd.grad(y.float().sum(), [x, a, b])
    assert [g.dtype for g in gradients] == [torch.float32] * 3, "gradients have other dtypes than their leaves"
    thin = 1.5 * half.double() @ a.detach().double().T
    magnitude = torch.ones(72, rows, dtype=torch.float64, device=place.device) @ thin.abs()
    return check(gradients[2], thin.sum(0).expand(72, -1), magnitude, what="dB")


def _ones(place: Place, width: int = 320) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, W, A and B of a layer that adds the elements of x that dropout keeps."""
    eye = torch.eye(width, device=place.device)
    x, weight = (
        torch.full(shape, value, device=place.device, dtype=torch.bfloat16)
        for shape, value in (((4, width), 1.0), ((width, width), 0.0))
    )
    return x, weight, eye, eye


@cases()
def dropout_of_replays(place: Place) -> str:
    """Each replay of a captured call with dropout draws other elements, and drops as many as an ordinary call."""
    x, weight, a, b = _ones(place)
    graph, (y,) = captured(lambda: [ops.lora_linear(x, weight, None, a, b, 1.0, 0.5)])
    masks = []
    for _ in range(4):
        graph.replay()
        torch.cuda.synchronize()
        masks.append(y.ne(0))
    for index, mask in enumerate(masks):
        share = float(mask.float().mean())
        assert 0.4 < share < 0.6, f"replay {index} kept {share:.0%} of the elements, expected 50%"
        assert not any(torch.equal(mask, other) for other in masks[:index]), "two replays dropped the same elements"
    seed = torch.tensor(5, device=place.device)
    graph, (y,) = captured(lambda: [ops.lora_linear(x, weight, None, a, b, 1.0, 0.5, seed)])
    for number in (5, -7):
        seed.fill_(number)
        graph.replay()
        torch.cuda.synchronize()
        same(y.ne(0), keep_mask(*x.shape, 0.5, number, place.device), f"mask of seed {number}")
    return "6 replays"


@cases(slow=True)
def dropout_of_cudagraph_trees(place: Place) -> str:
    """Under `torch.compile(mode="reduce-overhead")` dropout differs from step to step, forward as backward."""
    x, weight, a, b = _ones(place)
    x.requires_grad_()
    try:
        compiled = torch.compile(
            lambda x: ops.lora_linear(x, weight, None, a, b, 1.0, 0.5) * 2, mode="reduce-overhead", fullgraph=True
        )
        compiled(x)
    except (ImportError, torch._dynamo.exc.TorchDynamoException) as error:
        if "triton" in str(error).lower():
            raise Skip(f"torch.compile does not run here: {type(error).__name__}") from None
        raise
    masks: list[Tensor] = []
    for step in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        mask = y.detach().ne(0)
        (dx,) = torch.autograd.grad(y.float().sum(), x)
        same(dx.ne(0), mask, f"mask of step {step} backward")
        assert not any(torch.equal(mask, other) for other in masks), f"step {step} dropped what another one did"
        masks.append(mask)
    return "6 steps"


@cases()
def a_seed_of_the_cpu_is_not_captured(place: Place) -> None:
    """A graph would drop the same elements at every replay."""
    x, weight, a, b = _ones(place)
    seed = torch.tensor(5)
    try:
        captured(lambda: [ops.lora_linear(x, weight, None, a, b, 1.5, 0.1, seed)])
    except RuntimeError as error:
        assert "cannot be captured" in str(error), f"another error: {error}"
    else:
        raise AssertionError("dropout with a seed on the CPU was captured in a graph")


@cases()
def optimizer_steps_under_capture_are_refused(place: Place) -> None:
    p = torch.nn.Parameter(place.normal(8, 8, seed=1))
    p.grad = torch.ones_like(p)
    optimizer = optim.AdamW([p])

    def run() -> list[Tensor]:
        optimizer.step()
        return [p]

    try:
        captured(run)
    except RuntimeError as error:
        assert "CUDA graph cannot hold" in str(error), f"another error: {error}"
    else:
        raise AssertionError("an optimizer's step was captured in a graph")


@cases(emulated=True)
def a_paged_step_under_capture_is_refused_before_pages_move(place: Place) -> None:
    """The refusal precedes the look-up of the state, which does not exist here."""
    p, grad = place.normal(64, seed=1), place.normal(64, seed=2)
    scalars = LionScalars.from_options(1e-2, (0.9, 0.99), 0.1)

    def run() -> list[Tensor]:
        torch.ops.peftcore.optim_step_paged_([p], [grad], -1, [0], 0, "lion", list(scalars), [1], [0])
        return [p]

    try:
        if place.emulated:
            from card.emulated import capturing

            with capturing():
                run()
        else:
            captured(run)
    except RuntimeError as error:
        assert "CUDA graph cannot hold" in str(error), f"another error: {error}"
    else:
        raise AssertionError("a paged step was captured in a graph")
