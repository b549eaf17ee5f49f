"""dropout: the mask and factor of each element at every SIMD level, its gradient, and its checks."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from peftcore import ops
from peftcore.ops import keep_mask, lora_linear
from peftcore.ops.calling import operator_for
from peftcore.ops.dropout import Dropout, new_seed

_OPS = torch.ops.peftcore
SEED = torch.tensor(12345678901234)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 66), (2, 4100), (7,)], ids=str)
def test_values_and_gradient(level: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = ops.dropout(x, 0.5, SEED)
    keep = ops.keep_mask(x.shape[:-1].numel(), shape[-1], 0.5, SEED).view(shape)
    assert torch.equal(y, 2 * x * keep)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, 2 * keep.to(dtype))


def test_seeds_follow_the_generator() -> None:
    x = torch.ones(200, 50)
    torch.manual_seed(3)
    one, other = ops.dropout(x, 0.1), ops.dropout(x, 0.1)
    torch.manual_seed(3)
    assert torch.equal(ops.dropout(x, 0.1), one) and not torch.equal(one, other)
    assert abs(float((one == 0).float().mean()) - 0.1) < 0.01
    assert torch.equal(torch.func.vmap(lambda x: ops.dropout(x, 0.0), randomness="same")(x), x)


def test_float64_and_gradients_of_gradients() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, 0.5, SEED), (x,))
    x = torch.randn(4, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.dropout(x, 0.5, SEED).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    assert torch.equal(second, 8.0 * ops.keep_mask(4, 6, 0.5, SEED))


def test_checks() -> None:
    x = torch.randn(4, 6)
    torch.library.opcheck(_OPS.dropout, (x, 0.5, SEED))
    for call in (_OPS.dropout, Dropout):
        with pytest.raises(ValueError, match=r"dropout: dropout_p must be in \[0, 1\), found 1"):
            call(x, 1.0, SEED)
        with pytest.raises(ValueError, match="dropout: x must have at least one dimension, found a scalar"):
            call(torch.tensor(1.0), 0.5, SEED)
        with pytest.raises(TypeError, match="dropout: seed must be"):
            call(x, 0.5, torch.tensor(1.0))


def test_the_mask() -> None:
    assert torch.equal(keep_mask(3, 40, 0.5, 7)[:, :33], keep_mask(3, 33, 0.5, 7))
    assert not torch.equal(keep_mask(3, 40, 0.5, 7), keep_mask(3, 40, 0.5, 8))
    assert keep_mask(3, 40, 0.0, 7).all()
    for p in (0.01, 0.3, 0.9):
        kept = keep_mask(1000, 1001, p, SEED).double()
        deviation = (p * (1 - p) / kept.numel()) ** 0.5
        assert abs(kept.mean() - (1 - p)) < 5 * deviation
        assert (kept.mean(0) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 1000) ** 0.5
    # A known answer of Philox4x32-7: Random123's test vector for a counter and a key of zero is 5f6fb709 ...
    assert keep_mask(1, 1, (0xB709 - 0.25) / 65536, 0).item()
    assert not keep_mask(1, 1, (0xB709 + 1) / 65536, 0).item()


def test_a_seed_on_the_cpu_is_not_captured_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose replays would drop the same elements. No card is needed to ask: the tensors are fake."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        x, w = torch.empty(4, 16, device="cuda"), torch.empty(8, 16, device="cuda")
        a, b = torch.empty(2, 16, device="cuda"), torch.empty(8, 2, device="cuda")
        assert lora_linear(x, w, None, a, b).shape == (4, 8)
        with pytest.raises(RuntimeError, match="seed on the CPU cannot be captured in a CUDA graph"):
            lora_linear(x, w, None, a, b, dropout_p=0.5, seed=SEED)
        assert lora_linear(x, w, None, a, b, dropout_p=0.5, seed=torch.tensor(1, device="cuda")).shape == (4, 8)
        assert new_seed(x).device == x.device
        assert lora_linear(x, w, None, a, b, dropout_p=0.5).shape == (4, 8)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert new_seed(x).device.type == "cpu"
        assert lora_linear(x, w, None, a, b, dropout_p=0.5).shape == (4, 8)


def test_a_graph_of_a_card_draws_its_seed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled model has no number of the host in it, and nothing stays out of CUDA graphs. The card is fake."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode(), torch.no_grad():
        x, w, a, b = (torch.empty(*shape, device="cuda") for shape in ((4, 16), (8, 16), (2, 16), (8, 2)))
        traced = make_fx(lambda x, w, a, b: lora_linear(x, w, None, a, b, dropout_p=0.5))(x, w, a, b)
        nodes = [n for n in traced.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    (drawn,) = (n for n in nodes if n.target.name().startswith("aten::randint"))
    (ours,) = (n for n in nodes if n.target.namespace == "peftcore")
    assert ours.target is torch.ops.peftcore.lora_linear.default and drawn in ours.args
    assert drawn.kwargs["device"].type == "cuda"
    assert not any(torch.Tag.cudagraph_unsafe in n.target.tags or "local_scalar" in str(n.target) for n in nodes)
    seed = torch.tensor(1)
    assert operator_for("lora_linear_backward", seed) is torch.ops.peftcore.lora_linear_backward_seeded
    assert operator_for("lora_linear_backward", drawn.meta["val"]) is torch.ops.peftcore.lora_linear_backward
