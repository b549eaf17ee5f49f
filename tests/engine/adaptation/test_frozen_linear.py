"""The frozen output head multiplies all rows at once, as it did before it was frozen."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftcore
from peftcore import ops
from peftcore.engine.adaptation import frozen_linear
from peftcore.engine.adaptation.chain import OwnForward


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def last(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tiny.TOKENS, logits_to_keep=2).logits
    return logits


def test_the_logits_of_some_places_are_one_product() -> None:
    model = tiny.llama()
    head = model.lm_head
    before, hidden = last(model), torch.randn(3, 7, 32)
    peftcore.apply(model, "lora", target_modules=["q_proj"])
    assert torch.equal(last(model), before)
    with Operators() as operators:
        found = head(hidden[:, 5:])
    assert operators.seen.count("mm") == 1
    assert not {"bmm", "expand"} & set(operators.seen)
    with Operators() as operators:
        wanted = nn.functional.linear(hidden[:, 5:], head.weight)
    assert (
        "bmm" in operators.seen
    )  # else PyTorch does it by itself now, and peftcore.engine.adaptation.frozen_linear may go
    torch.testing.assert_close(found, wanted)
    assert isinstance(head, nn.Linear)
    assert type(head).__name__ == "Linear"
    peftcore.remove(model)
    assert type(head) is nn.Linear
    assert torch.equal(last(model), before)


def operators_of(head: nn.Module, hidden: Tensor) -> list[str]:
    with Operators() as operators:
        head(hidden)
    return [name for name in operators.seen if name in ("mm", "addmm", "bmm", "dense_linear")]


def test_a_decoded_token_in_bf16_is_one_call_of_the_operator_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "WIDENED", frozenset())
    model = tiny.llama().bfloat16()
    model.lm_head.weight.requires_grad_(False)
    peftcore.apply(model, "lora", target_modules=["q_proj"])
    hidden = torch.randn(2, 7, 32).bfloat16()
    with torch.no_grad():
        assert operators_of(model.lm_head, hidden[:, -1:]) == ["dense_linear"]
        assert operators_of(model.lm_head, hidden[0, 0]) == ["dense_linear"]
        assert operators_of(model.lm_head, hidden) == ["mm"]
        torch.testing.assert_close(model.lm_head(hidden[:, -1:]), hidden[:, -1:] @ model.lm_head.weight.T)
        with torch.autocast("cpu", torch.float16):
            assert operators_of(model.lm_head, hidden[:, -1:]) == ["mm"]
        model.generate(tiny.TOKENS[:1], max_new_tokens=2, do_sample=False)
    assert operators_of(model.lm_head, hidden[:, -1:].requires_grad_()) == ["mm"]
    peftcore.remove(model)
    assert "dense_linear" not in operators_of(model.lm_head, hidden[:, -1:].detach())


def test_the_head_of_a_quantized_model_without_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "WIDENED", frozenset())
    model = peftcore.quantize(tiny.llama().bfloat16().requires_grad_(False))
    hidden = torch.randn(2, 7, 32).bfloat16()
    assert isinstance(model.lm_head, nn.Linear)
    with torch.no_grad():
        assert operators_of(model.lm_head, hidden[:, -1:]) == ["dense_linear"]
        assert operators_of(model.lm_head, hidden) == ["mm"]
    whole = peftcore.quantize(model, skip=[])
    assert whole.lm_head.is_quantized


SLOW = [torch.float16, torch.bfloat16]


@pytest.fixture
def slow_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this processor count as one without instructions for bf16 and fp16."""
    monkeypatch.setattr(ops, "WIDENED", frozenset(SLOW))


def matrix_products(model: nn.Module, **inputs: Tensor) -> list[str]:
    with Operators() as operators:
        model(**inputs).logits.float().sum().backward()
    return [name for name in operators.seen if name in ("mm", "addmm", "dense_linear", "lora_linear")]


@pytest.mark.usefixtures("slow_16_bits")
@pytest.mark.parametrize("dtype", SLOW)
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_no_frozen_layer_of_a_slow_dtype_is_left_to_pytorch(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = peftcore.apply(make().to(dtype), "lora", r=2)
    seen = matrix_products(model, input_ids=tiny.TOKENS)
    assert {"dense_linear", "lora_linear"} == set(seen)
    model = peftcore.remove(model)
    assert {type(module).__mro__[0].__module__ for module in model.modules() if isinstance(module, nn.Linear)} <= {
        "torch.nn.modules.linear"
    }
    assert not any(hasattr(type(module), "_peftcore_folds") for module in model.modules())


@pytest.mark.usefixtures("slow_16_bits")
def test_under_autocast_fp32_layers_are_multiplied_by_the_operator() -> None:
    model = peftcore.apply(tiny.llama(), "lora", r=2, target_modules=["q_proj"])
    with torch.autocast("cpu", torch.bfloat16):
        assert set(matrix_products(model, input_ids=tiny.TOKENS)) == {"dense_linear", "lora_linear"}
    assert "dense_linear" not in matrix_products(model, input_ids=tiny.TOKENS)


@pytest.mark.usefixtures("slow_16_bits")
def test_what_stays_dense_of_a_quantized_model_is_multiplied_by_the_operator() -> None:
    model = peftcore.quantize(tiny.llama().bfloat16())
    with torch.no_grad():
        assert operators_of(model.lm_head, torch.randn(2, 7, 32).bfloat16()) == ["dense_linear"]
    assert "dense_linear" not in operators_of(model.lm_head, torch.randn(2, 7, 32).bfloat16())  # it trains


@pytest.mark.usefixtures("slow_16_bits")
@pytest.mark.parametrize("dtype", SLOW)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32,), (40, 32), (2, 3, 32), (0, 3, 32)])
def test_gradients_of_a_slow_dtype(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(32, 48, bias=bias, dtype=dtype)
    layer.weight.requires_grad_(False)
    frozen_linear.fold(layer)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    inputs = [x] + ([layer.bias] if bias else [])
    wide = [t.detach().double().requires_grad_() for t in inputs]
    wanted = nn.functional.linear(wide[0], layer.weight.double(), wide[1] if bias else None)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2)
    found = torch.autograd.grad(y, inputs, dy)
    for mine, theirs in zip(found, torch.autograd.grad(wanted, wide, dy.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_a_head_with_a_bias_gives_the_same_bits(cut: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "WIDENED", frozenset())  # where PyTorch multiplies bf16 well, this is its own product
    model = tiny.llama()
    model.lm_head = nn.Linear(32, 96).bfloat16()
    hidden = torch.randn(3, 7, 32, dtype=torch.bfloat16)
    hidden = hidden[:, 5:] if cut else hidden
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model.lm_head(hidden)
        peftcore.apply(model, "lora", target_modules=["q_proj"])
        assert torch.equal(model.lm_head(hidden), before)


@pytest.mark.parametrize("shape", [(32,), (4, 32), (2, 3, 32), (2, 1, 3, 32), (0, 3, 32)])
def test_any_shape_and_its_gradient(shape: tuple[int, ...]) -> None:
    model = peftcore.apply(tiny.llama(), "lora", target_modules=["q_proj"])
    x = torch.randn(shape, requires_grad=True)
    y = model.lm_head(x)
    wanted = x @ model.lm_head.weight.T
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(wanted, x, dy))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_give_the_class_back(copied: Callable[[nn.Module], Any]) -> None:
    model = copied(peftcore.apply(tiny.llama(), "lora", target_modules=["q_proj"]))
    assert torch.equal(last(model), last(peftcore.remove(copied(model))))
    assert type(peftcore.remove(model).lm_head) is nn.Linear


def test_adapters_of_the_head_itself_are_fused() -> None:
    model = peftcore.apply(tiny.llama(), "lora", target_modules=["q_proj"])
    peftcore.apply(model, "lora", target_modules=["lm_head"], adapter="head")
    base: OwnForward = model.lm_head._peftcore_base
    assert base.linear_operands(torch.randn(2, 32)) is not None
    peftcore.remove(model, "head")
    peftcore.remove(model, "default")
    assert type(model.lm_head) is nn.Linear


def test_a_head_that_computes_something_else_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = tiny.llama()
    model.lm_head.__class__ = Scaled
    before = last(model)
    peftcore.apply(model, "lora", target_modules=["q_proj"])
    assert type(model.lm_head) is Scaled
    torch.testing.assert_close(last(model), before)  # by another product, of the frozen weight


def test_a_head_that_trains_whole() -> None:
    model = peftcore.apply(tiny.llama(), "lora", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
    assert model.lm_head.weight.grad is not None
    last(peftcore.remove(model))
    assert type(model.lm_head) is nn.Linear


def test_a_head_that_a_later_adapter_trains() -> None:
    model = peftcore.apply(tiny.llama(), "lora", target_modules=["q_proj"])
    peftcore.apply(model, "lora", target_modules=["q_proj"], modules_to_save=["lm_head"], adapter="second")
    last(peftcore.remove(model, "default"))
    last(peftcore.remove(model, "second"))
    assert type(model.lm_head) is nn.Linear
