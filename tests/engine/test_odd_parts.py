"""Parts that no method can adapt: refused by name before anything changes."""

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.quantization import quantized_layers


class Scaling(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class CalledWithMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Scaling(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x, scale=2.0))


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_a_linear_layer_that_is_called_with_more_than_x(method: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match="cannot adapt 'a': the model calls it with scale besides"):
        peftcore.apply(CalledWithMore(), method, target_modules=["a", "b"])
    model, x = CalledWithMore(), torch.randn(2, 32)
    peftcore.apply(model, method, target_modules=["b"])
    model(x).sum().backward()


def test_quantize_leaves_it_dense() -> None:
    model, x = CalledWithMore(), torch.randn(2, 32)
    with pytest.warns(UserWarning, match="leaves layers of CalledWithMore dense: 'a'"):
        peftcore.quantize(model)
    assert [path for path, _ in quantized_layers(model)] == ["b"]
    assert model(x).isfinite().all()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, dtype=torch.complex64), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.to(torch.complex64)).real)


@pytest.mark.parametrize("method", ["lora", "ia3", "boft", "hra"])
def test_complex_weights(method: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match="cannot adapt 'a', because its weights are complex"):
        peftcore.apply(Complex(), method, target_modules=["a"])
    peftcore.apply(Complex(), "lora", target_modules=["b"])


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_scripted_parts() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    model = nn.Sequential(nn.Linear(8, 8), scripted)
    for change in (
        lambda: peftcore.apply(model, "lora", target_modules=["0"]),
        lambda: peftcore.plan(model, "lora", target_modules=["0"]),
        lambda: peftcore.quantize(model),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=r"'1' is a torch\.jit\.ScriptModule"):
            change()
