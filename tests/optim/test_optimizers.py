"""The optimizers as users of torch and bitsandbytes know them: same numbers, same protocols, paged or not."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from peftcore import ops, optim
from peftcore.ops import optim as step_ops

PAGED = {"budget": 8192, "page_bytes": 4096, "directory": "/tmp"}
needs_extension = pytest.mark.skipif(ops.extension is None, reason="no _C")
pytestmark = needs_extension

KINDS = {
    "AdamW": optim.AdamW,
    "AdamW8bit": optim.AdamW8bit,
    "Lion": optim.Lion,
    "SGD": optim.SGD,
    "PagedAdamW": lambda params, **options: optim.PagedAdamW(params, **{**PAGED, **options}),
    "PagedAdamW8bit": lambda params, **options: optim.PagedAdamW8bit(params, **{**PAGED, **options}),
    "PagedLion": lambda params, **options: optim.PagedLion(params, **{**PAGED, **options}),
    "PagedSGD": lambda params, **options: optim.PagedSGD(params, **{**PAGED, **options}),
}
SHAPES = [(64, 48), (1000,), (7,), (16, 256), ()]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def parameters(seed=0, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params, step, skip=()):
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = None if i in skip else grad.to(p.dtype)


def train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        set_grads(params, step)
        optimizer.step()


def equal(params, others):
    return all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("make", [KINDS["AdamW"], KINDS["PagedAdamW"]], ids=["resident", "paged"])
@pytest.mark.parametrize("options", [{}, {"betas": (0.3, 0.99), "weight_decay": 0.0}, {"maximize": True}])
def test_a_thousand_steps_of_adamw_have_the_bits_of_torchs_fused_one(make, options):
    shapes = [(64, 48), (16, 256), (1024,)]  # torch's own rounding differs in the last elements of odd sizes
    mine, theirs = parameters(shapes=shapes), parameters(shapes=shapes)
    ours, torchs = make(mine, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for step in range(1000):
        set_grads(mine, step)
        set_grads(theirs, step)
        ours.step()
        torchs.step()
    assert equal(mine, theirs)
    state = ours.state_dict()["state"]
    for i, wanted in torchs.state_dict()["state"].items():
        assert all(torch.equal(state[i][name], wanted[name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_odd_sizes_are_within_roundings_of_torchs_steps():
    mine, theirs = parameters(), parameters()
    ours, torchs = optim.AdamW(mine), torch.optim.AdamW(theirs, foreach=False)
    train(ours, mine, 1000)
    train(torchs, theirs, 1000)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}])
def test_sgd_follows_torchs(options):
    options = {"lr": 0.1, **options}
    mine, theirs = parameters(), parameters()
    train(optim.SGD(mine, **options), mine, 50)
    train(torch.optim.SGD(theirs, **options), theirs, 50)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_8_bits_follow_bitsandbytes_within_its_quantization():
    """Both quantize the same way; bitsandbytes decays after the update, so none here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes as bnb
    mine, theirs, exact = (parameters(shapes=[(64, 256)]) for _ in range(3))
    ours = optim.AdamW8bit(mine, weight_decay=0.0)
    peer = bnb.optim.AdamW8bit(theirs, weight_decay=0.0, min_8bit_size=0)
    full = torch.optim.AdamW(exact, weight_decay=0.0)
    start = mine[0].detach().clone()
    for optimizer, params in ((ours, mine), (peer, theirs), (full, exact)):
        train(optimizer, params, 30)
    ours_off = (mine[0] - exact[0]).abs().mean()
    theirs_off = (theirs[0] - exact[0]).abs().mean()
    moved = (exact[0] - start).abs().mean()
    assert ours_off <= 1.1 * theirs_off and ours_off < 0.1 * moved
    assert (mine[0] - theirs[0]).abs().mean() <= 2 * theirs_off


def test_8_bit_state_is_a_quarter():
    params = parameters(shapes=[(64, 256)])
    small, large = optim.AdamW8bit(params), optim.AdamW(params)
    sizes = []
    for optimizer in (small, large):
        train(optimizer, params, 1)
        sizes.append(sum(t.nbytes for t in optimizer.state[params[0]].values() if torch.is_tensor(t)))
    assert sizes[0] == sizes[1] * (256 + 4) / 1024


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion", "SGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [4096, 3 * 4096, 1 << 20])
def test_paged_and_resident_have_the_same_bits(name, dtype, budget):
    mine, others = parameters(dtype=dtype), parameters(dtype=dtype)
    resident = KINDS[name](mine, stochastic_rounding=True)
    paged = KINDS[f"Paged{name}"](others, stochastic_rounding=True, budget=budget)
    train(resident, mine, 7)
    train(paged, others, 7)
    assert equal(mine, others)
    assert paged.paging().peak <= budget


def test_16_bit_parameters_lose_small_updates_unless_rounded_at_random():
    ends = {}
    for stochastic in (False, True):
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = optim.AdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[stochastic] = p.double().mean().item()
    assert ends[False] == 1.0 and abs(ends[True] - 0.99) < 5e-4


def test_each_parameter_is_rounded_by_random_bits_of_its_number():
    found, others = ([nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(3)] for _ in range(2))
    for params, with_gradients in ((found, found), (others, others[1:2])):
        for p in with_gradients:
            p.grad = torch.ones_like(p)
        optim.AdamW(params, lr=1e-4, weight_decay=0.0, stochastic_rounding=True).step()
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    assert torch.equal(found[1], others[1]) and torch.equal(others[0], torch.ones_like(others[0]))


def test_state_moves_to_torch_and_back(kind):
    if kind(parameters()).rule.name != "adamw":
        pytest.skip("torch has no such optimizer of the same state")
    mine, theirs = parameters(), parameters()
    ours = kind(mine)
    train(ours, mine, 5)
    torchs = torch.optim.AdamW(theirs)
    torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for p, q in zip(theirs, mine, strict=True):
        p.data.copy_(q)
    train(torchs, theirs, 5, 5)
    again = kind(parameters())
    again.load_state_dict(torchs.state_dict())
    for i, values in again.state_dict()["state"].items():
        assert values["step"] == 10 and values["step"].dtype == torch.float32
        assert torch.equal(values["exp_avg_sq"], torchs.state_dict()["state"][i]["exp_avg_sq"])
    train(ours, mine, 5, 5)
    for p, q in zip(theirs, mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_resuming_is_exact_on_another_budget(kind):
    mine, others = parameters(), parameters()
    optimizer = kind(mine)
    train(optimizer, mine, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    for p, q in zip(others, mine, strict=True):
        p.data.copy_(q)
    paged = hasattr(optimizer, "paging")
    other = kind(others, budget=4096, page_bytes=8192 // 2) if paged else kind(others)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, mine, 4, 4)
    train(other, others, 4, 4)
    assert equal(mine, others)


def test_state_of_32_bits_becomes_8_bits_and_back():
    params = parameters()
    full = optim.AdamW(params)
    train(full, params, 3)
    small = optim.PagedAdamW8bit(parameters(), **PAGED)
    small.load_state_dict(full.state_dict())
    again = optim.AdamW(parameters())
    again.load_state_dict(small.state_dict())
    for i, values in again.state_dict()["state"].items():
        wanted = full.state_dict()["state"][i]
        scale = wanted["exp_avg"].abs().max()
        assert (values["exp_avg"] - wanted["exp_avg"]).abs().max() <= 0.02 * scale


def test_copies_and_pickles_go_on_alone(kind):
    mine = parameters()
    optimizer = kind(mine)
    train(optimizer, mine, 3)
    for duplicate in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        other = duplicate(optimizer)
        others = [p for group in other.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in mine]
        train(other, others, 2, 3)
        assert equal(mine, kept) and not equal(others, kept)
        twin = kind(again := [nn.Parameter(p.clone()) for p in kept])
        twin.load_state_dict(optimizer.state_dict())
        train(twin, again, 2, 3)
        assert equal(again, others)


def test_a_group_added_and_a_parameter_without_gradient(kind):
    mine = parameters()
    optimizer = kind([{"params": mine[:2], "lr": 1e-2}, {"params": mine[2:4], "weight_decay": 0.5}])
    before = [p.detach().clone() for p in mine]
    for step in range(3):
        set_grads(mine, step, skip=(1,))
        optimizer.step()
    assert torch.equal(mine[1], before[1]) and mine[1] not in optimizer.state
    optimizer.add_param_group({"params": mine[4:]})
    train(optimizer, mine, 2, 3)
    steps = {i: int(s["step"]) for i, s in optimizer.state_dict()["state"].items()}
    assert steps == {0: 5, 1: 2, 2: 5, 3: 5, 4: 2}
    assert not any(torch.equal(p, q) for p, q in zip(mine, before, strict=True))


def test_schedulers_closures_and_clipping(kind):
    p = nn.Parameter(torch.full((300,), 2.0))
    optimizer = kind([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_([p], 1.0)
        return loss

    losses = []
    for _ in range(4):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**4


def test_grad_scaler_skips_what_is_not_finite(kind):
    plain, scaled = parameters(), parameters()
    first, second = kind(plain), kind(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        set_grads(plain, step)
        weights = [p.grad.clone() for p in plain]
        second.zero_grad()
        scaler.scale(sum((p * w).sum() for p, w in zip(scaled, weights, strict=True))).backward()
        if step == 2:
            scaled[0].grad[0] = math.inf
        scaler.step(second)
        scaler.update()
        if step != 2:
            first.step()
    assert equal(plain, scaled)
    assert int(second.state_dict()["state"][0]["step"]) == 3


def test_strided_parameters_and_gradients(kind):
    dense, strided = (nn.Parameter(torch.randn(20, 30, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    strided = nn.Parameter(dense.detach().t().contiguous().t())
    first, second = kind([dense]), kind([strided])
    for step in range(3):
        set_grads([dense], step)
        strided.grad = dense.grad.t().contiguous().t()
        first.step()
        second.step()
    assert torch.equal(dense, strided) and not strided.is_contiguous()


def test_a_step_counts_as_a_change_of_parameters_that_count_changes(kind):
    params = parameters()
    with torch.inference_mode():
        uncounted = parameters()
    before = [param._version for param in params]
    for several in (params, uncounted):
        set_grads(several, 0)
    kind([*params, *uncounted]).step()
    assert equal(params, uncounted) and all(param.is_inference() for param in uncounted)
    assert all(param._version > version for param, version in zip(params, before, strict=True))


def test_what_is_refused(kind):
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients. Use torch.optim.SparseAdam"):
        kind(embedding.parameters()).step()
    double = nn.Parameter(torch.ones(3, dtype=torch.double))
    double.grad = torch.ones_like(double)
    optimizer = kind([double])
    with pytest.raises(TypeError, match=r"found torch.float64"):
        optimizer.step()
    assert not optimizer.state
    with pytest.raises(ValueError, match="must not be negative"):
        kind([double], lr=-1)
    saved = kind(parameters())
    with pytest.raises(ValueError, match=r"has groups of .*, but this optimizer has groups of"):
        saved.load_state_dict(kind(parameters(shapes=[(3,)])).state_dict())


def test_amsgrad_is_refused():
    with pytest.raises(ValueError, match="amsgrad is not supported"):
        optim.AdamW(parameters(), amsgrad=True)
    params = parameters()
    theirs = torch.optim.AdamW(params, amsgrad=True)
    train(theirs, params, 1)
    with pytest.raises(ValueError, match="does not support amsgrad"):
        optim.AdamW(parameters()).load_state_dict(theirs.state_dict())


def test_saved_state_of_another_shape_is_refused(kind):
    params = parameters()
    optimizer = kind(params)
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    name = optimizer.rule.planes[0].name
    saved["state"][0][name] = saved["state"][0][name][:3]
    with pytest.raises(ValueError, match=f"saved '{name}' has shape"):
        kind(parameters()).load_state_dict(saved)
    del saved["state"][0][name]
    with pytest.raises(ValueError, match=f"has no tensor '{name}'"):
        kind(parameters()).load_state_dict(saved)


def test_distributed_checkpoints(kind, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 7))

    mine, other = model(), model()
    optimizer = kind(mine.parameters())
    train(optimizer, list(mine.parameters()), 3)
    saved = {"optimizer": get_optimizer_state_dict(mine, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group
        dcp.save(saved, checkpoint_id=tmp_path)
        second = kind(other.parameters())
        loaded = {"optimizer": get_optimizer_state_dict(other, second)}
        dcp.load(loaded, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, second, loaded["optimizer"])
    other.load_state_dict(mine.state_dict())
    train(optimizer, list(mine.parameters()), 3, 3)
    train(second, list(other.parameters()), 3, 3)
    assert equal(list(mine.parameters()), list(other.parameters()))


def test_without_the_extension_resident_ones_work_and_paged_ones_say_why(monkeypatch):
    monkeypatch.setattr(step_ops._extension, "extension", None)
    monkeypatch.setattr(step_ops._extension, "missing_because", "it has not been built here")
    with pytest.raises(
        RuntimeError,
        match=r"PagedAdamW8bit needs the compiled extension, but .* has not been built here. "
        r"AdamW8bit works",
    ):
        optim.PagedAdamW8bit(parameters())


@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.PagedAdamW8bit, optim.AdamW])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(exp_avg_absmax=state["exp_avg_absmax"][:1]), "'exp_avg_absmax' has 1 scales"),
        (lambda state: state.update(exp_avg=state["exp_avg"].float()), "'exp_avg' is torch.float32, but state with"),
    ],
    ids=["short", "dtype"],
)
def test_8bit_state_that_does_not_fit_is_refused(kind, change, message):
    def stepped(kind):
        param = torch.nn.Parameter(torch.ones(20, 30))
        optimizer = kind([param])
        param.grad = torch.ones_like(param)
        optimizer.step()
        return optimizer

    saved = stepped(optim.AdamW8bit).state_dict()
    change(saved["state"][0])
    with pytest.raises(ValueError, match=message):
        stepped(kind).load_state_dict(saved)
