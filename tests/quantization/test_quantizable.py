"""Which layers are quantized where their class is not nn.Linear, or another one reads their weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore.quantization import QuantizedLinear, quantized_layers

# x @ W.T + b and its kernels round apart.
CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-5}


def kinds(model: nn.Module) -> set[str]:
    return {path for path, _ in quantized_layers(model)}


def falcon() -> Any:
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=True, alibi=False
    )
    return transformers.FalconForCausalLM(config).eval()


def test_falcons_linear_layers() -> None:
    """They are of a subclass of nn.Linear with a forward of its own that computes the same."""
    model, tokens = peftcore.quantize(falcon()), torch.arange(12)[None]
    assert len(kinds(model)) == 8 and not isinstance(model.lm_head, QuantizedLinear)
    with torch.no_grad():
        found, dense = model(tokens).logits, falcon()(tokens).logits
        wanted = peftcore.dequantize(copy.deepcopy(model))(tokens).logits
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert 1e-3 < (found - dense).norm() / dense.norm() < 0.2


def test_qlora_of_falcon() -> None:
    model = peftcore.apply(falcon(), "qlora", r=2)
    assert len(kinds(model)) == 8
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    assert all(p.grad is not None for _, p in peftcore.engine.adapter_parameters(model, "default"))


class WithInit(nn.Linear):
    """ESMFold's kind: it draws its weights in a way of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.way = "lecun"


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-100, 100))


class InFp32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class NoisyInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.1 if self.training else 0.0)


class WithMask(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.register_buffer("mask", torch.ones(width))


class WithMethod(nn.Linear):
    def reversed(self, y: Tensor) -> Tensor:
        return y @ self.weight


class WithProperty(nn.Linear):
    @property
    def scale(self) -> Tensor:
        return self.weight.abs().mean()


def test_a_subclass_that_computes_the_same_is_quantized() -> None:
    model = peftcore.quantize(nn.Sequential(WithInit(64), nn.Linear(64, 64)))
    assert kinds(model) == {"0", "1"}


@pytest.mark.parametrize("cls", [Scaled, Clamped, InFp32, NoisyInTraining, WithMask, WithMethod, WithProperty])
def test_a_subclass_that_does_more_stays_dense_with_a_warning(cls: Any) -> None:
    layer = cls(64) if cls is WithMask else cls(64, 64)
    with pytest.warns(UserWarning, match=f"'1', because {cls.__name__} is not known to compute") as found:
        model = peftcore.quantize(nn.Sequential(nn.Linear(64, 64), layer))
    assert kinds(model) == {"0"} and len(found) == 1
    peftcore.quantize(nn.Sequential(nn.Linear(64, 64), copy.deepcopy(layer)), skip=["1"])  # as it was said


def encoder() -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


SKIPPED = ["self_attn"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the dense one's fused path
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_transformer_encoder_computes_what_the_dequantized_one_does(training: bool, masked: bool) -> None:
    """In evaluation without gradients it would take a fused path, which reads the weights."""
    model = peftcore.quantize(encoder(), skip=SKIPPED)
    assert kinds(model) == {f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)}
    dense = peftcore.dequantize(copy.deepcopy(model))
    x, padding = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    call: dict[str, Any] = {"src_key_padding_mask": padding} if masked else {}
    outputs = []
    for each in (model, dense):
        for part in each.modules():
            part.training = training and not isinstance(part, nn.Dropout)
            if isinstance(part, nn.MultiheadAttention):
                part.dropout = 0.0
        with torch.set_grad_enabled(training):
            outputs.append(each(x, **call)[~padding if masked else ...])
    torch.testing.assert_close(*outputs, **CLOSE)
    assert (outputs[0] - encoder()(x, **call)[~padding if masked else ...]).abs().max() > 1e-3


def test_the_fused_paths_are_as_they_were_behind_dequantize() -> None:
    model = encoder()
    flags = [model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers)]
    state = {key: value for key, value in vars(model.layers[0]).items() if not key.startswith("_modules")}
    peftcore.quantize(model, skip=[*SKIPPED, "layers.1"])
    assert not model.use_nested_tensor and not model.layers[0].activation_relu_or_gelu
    assert model.layers[1].activation_relu_or_gelu == flags[2]
    peftcore.dequantize(model)
    assert [model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers)] == flags
    assert vars(model.layers[0]).keys() == {*state, "_modules"}


@pytest.mark.parametrize("path", ["layers.0.linear1", "layers.1"])
def test_a_part_of_an_encoder_is_quantized_alone(path: str) -> None:
    """`quantize` is given the part, which knows nothing of the layer or the encoder around it."""
    model, x = encoder(), torch.randn(2, 5, 64)
    flags = [model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers)]
    part = model.get_submodule(path)
    peftcore.quantize(part, skip=SKIPPED if path == "layers.1" else None)
    with torch.no_grad():
        found = model(x)
    torch.testing.assert_close(found, model(x).detach(), **CLOSE)
    peftcore.dequantize(part)
    assert [model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers)] == flags
    assert all(type(layer.activation_relu_or_gelu) is int for layer in model.layers)


def test_lora_on_a_quantized_encoder() -> None:
    model, x = peftcore.quantize(encoder(), skip=SKIPPED), torch.randn(2, 5, 64)
    with torch.no_grad():
        before = model(x)
    peftcore.apply(model, "lora", target_modules=["linear1", "linear2"], r=2)
    with torch.no_grad():
        for _, parameter in peftcore.engine.adapter_parameters(model, "default"):
            parameter.add_(0.1)
        assert (model(x) - before).abs().max() > 1e-3
    peftcore.remove(model)
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_attention_of_pytorch_stays_dense_with_a_warning() -> None:
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "attention": nn.MultiheadAttention(64, 4)})
    with pytest.warns(UserWarning) as found:
        peftcore.quantize(model)
    assert kinds(model) == {"first"}
    assert str(found[-1].message) == (
        "quantize leaves layers of ModuleDict dense: 'attention', because nn.MultiheadAttention reads the "
        "weights of its "
        "layers itself. To silence this warning, add them to skip"
    )


def test_falcon_saved_in_4_bits_is_read_here(tmp_path: Path) -> None:
    """transformers with bitsandbytes takes no subclass of nn.Linear, and refuses the tensors."""
    model, tokens = peftcore.quantize(falcon()), torch.arange(12)[None]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(peftcore.quantization.load(tmp_path)(tokens).logits, model(tokens).logits)
        falcon().save_pretrained(tmp_path / "dense")
        packed = transformers.FalconForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=peftcore.FourBitConfig()
        )
        assert torch.equal(packed(tokens).logits, model(tokens).logits)
