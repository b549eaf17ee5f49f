"""LoRA on `nn.MultiheadAttention`, whose weights are read past the layers that hold them, and on encoders around it."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.plugin import disturb

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
X, MEMORY = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)


class Attend(nn.Module):
    """Self-attention, then cross-attention, both with their weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(16, 4, **options)
        self.cross = nn.MultiheadAttention(16, 2, **options)
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, weights = self.self_attn(x, x, x)
        keys, values = (x[:, :-1], x[:, 1:]) if self.cross.batch_first else (x[:-1], x[1:])
        z, others = self.cross(y, keys, values, average_attn_weights=False)
        return self.head(z), weights, others


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first"))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, MEMORY, tgt_mask=nn.Transformer.generate_square_subsequent_mask(5), tgt_is_causal=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch first": lambda: Attend(batch_first=True),
    "sequence first": lambda: Attend(),
    "no bias": lambda: Attend(bias=False, batch_first=True),
    "bias of keys and values": lambda: Attend(add_bias_kv=True, add_zero_attn=True),
    "decoder": Decoder,
    "encoder": encoder,
    "encoder, norm first": lambda: encoder(norm_first=True),
}


def make_encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def outputs(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """With gradients, since PEFT's adapters do not act on the fused path of an encoder."""
    result = model(*args or (X,), **kwargs)
    return [tensor.detach() for tensor in (result if isinstance(result, tuple) else (result,))]


def quiet(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("kind", list(MODELS))
def test_peft_reads_ours(kind: str, tmp_path: Path) -> None:
    model = peftcore.apply(make_encoder(kind), "lora", r=4, lora_alpha=12, rank_pattern={"layers.1.self_attn": 2})
    base = outputs(model)
    disturb(model, "default", seed=1)
    expected = outputs(model.train())
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(expected, base, strict=True))
    peftcore.save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert "out_proj" not in written and {"self_attn", "linear1"} & set(written)
    close(outputs(quiet(peft.PeftModel.from_pretrained, make_encoder(kind), tmp_path).train()), expected)


@pytest.mark.parametrize("kind", list(MODELS))
def test_ours_reads_peft(kind: str, tmp_path: Path) -> None:
    targets = [
        name for name, _ in make_encoder(kind).named_modules() if name.endswith(("attn", "cross", "linear2", "head"))
    ]
    config = peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=targets)
    peft_model = quiet(peft.get_peft_model, make_encoder(kind), config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    quiet(peft_model.save_pretrained, tmp_path)
    close(outputs(peftcore.load(make_encoder(kind), tmp_path).train()), outputs(peft_model.train()))


@pytest.mark.parametrize("kind", list(MODELS))
def test_merged_unmerged_removed(kind: str) -> None:
    model, base = make_encoder(kind), make_encoder(kind)
    peftcore.apply(model, "lora", r=4)
    disturb(model, "default", seed=1)
    peftcore.apply(model, "lora", r=2, adapter="second", target_modules=["self_attn"])
    disturb(model, "second", seed=2)
    acting = outputs(model)
    alone = copy.deepcopy(model)
    close(outputs(peftcore.merge(model, undo=True)), acting)
    assert not torch.equal(outputs(model)[0], outputs(base)[0])
    for one, other in zip(outputs(peftcore.unmerge(model)), acting, strict=True):
        assert torch.equal(one, other)
    close(outputs(peftcore.merge(alone)), acting)
    for name in ("default", "second"):
        peftcore.remove(model, name)
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert str(model) == str(base)


def test_gradients_are_those_of_a_changed_weight() -> None:
    model = peftcore.apply(make_encoder("batch first"), "lora", r=4, target_modules=["self_attn"])
    disturb(model, "default", seed=1)
    adapter, attention = model.self_attn.peftcore["default"], make_encoder("batch first")
    model.train()(X)[0].square().sum().backward()
    whole = nn.Parameter(torch.cat([attention.self_attn.in_proj_weight, attention.self_attn.out_proj.weight]).detach())
    with torch.no_grad():
        whole.copy_(adapter.merged(whole, None)[0])
    changed = {"self_attn.in_proj_weight": whole[:48], "self_attn.out_proj.weight": whole[48:]}
    torch.func.functional_call(attention.train(), changed, X)[0].square().sum().backward()
    torch.testing.assert_close(adapter.lora_A.grad, adapter.scale * adapter.lora_B.T @ whole.grad[:48])
    torch.testing.assert_close(
        adapter.out_proj.lora_B.grad, 2 * adapter.scale * whole.grad[48:] @ adapter.out_proj.lora_A.T
    )


FUSED = {
    "all": "all-linear",
    "first": ["layers.0.linear1"],
    "last": ["layers.1.linear2"],
    "heads": ["layers.1.self_attn"],
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", list(FUSED.values()), ids=list(FUSED))
def test_evaluation_computes_what_was_trained(targets: Any, norm_first: bool) -> None:
    """PyTorch's fused paths would read the weights and pass by the adapters."""
    kind = "encoder, norm first" if norm_first else "encoder"
    base, model = make_encoder(kind), peftcore.apply(make_encoder(kind), "lora", target_modules=targets)
    disturb(model, "default", seed=1)
    for masked in ({}, {"src_key_padding_mask": PADDING}):
        kept = ~PADDING if masked else torch.ones_like(PADDING)
        expected = model.train()(X, **masked)[kept].detach()
        model.eval()
        assert (base(X, **masked)[kept] - expected).abs().max() > 1e-3
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for context in (torch.no_grad, torch.inference_mode):
                with context():
                    torch.testing.assert_close(twin(X, **masked)[kept], expected, rtol=0, atol=1e-5)
        with torch.no_grad(), peftcore.disabled(model):
            torch.testing.assert_close(model(X, **masked)[kept], base(X, **masked)[kept], rtol=0, atol=1e-5)
    nested = torch.nested.nested_tensor([X[0, :3], X[1], X[2, :4]])
    with torch.no_grad():
        torch.testing.assert_close(model(nested).to_padded_tensor(0.0)[~PADDING], expected, rtol=0, atol=1e-5)
    peftcore.remove(model)
    assert [vars(layer).get("activation_relu_or_gelu") for layer in model.layers] == [1, 1]
    assert type(model.layers[0].activation_relu_or_gelu) is int and type(model.use_nested_tensor) is bool
    with torch.no_grad():
        assert torch.equal(model(X, src_key_padding_mask=PADDING), base(X, src_key_padding_mask=PADDING))


def test_a_compiled_encoder() -> None:
    model = peftcore.apply(make_encoder("encoder"), "lora")
    disturb(model, "default", seed=1)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(X), model(X))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (lambda: nn.MultiheadAttention(16, 4, kdim=8), {}, r"keys or values have another width \(kdim, vdim\)"),
        (Attend, {"target_modules": ["out_proj"]}, r"without calling it.*target_modules=\['self_attn'\]"),
        (Attend, {"bias": "lora_only"}, r"bias='lora_only' is not supported with 'self_attn'"),
    ],
)
def test_what_is_refused(model: Callable[[], nn.Module], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(nn.Sequential(model()) if model is not Attend else model(), "lora", **fields)


def test_an_excluded_projection_excludes_the_attention() -> None:
    for excluded in (["out_proj"], ["self_attn", "cross"]):
        with pytest.warns(UserWarning, match=r"reaches 5.19 % of the weights in layers"):
            model = peftcore.apply(make_encoder("batch first"), "lora", exclude_modules=excluded)
        assert [path for path, _ in peftcore.engine.adapter_modules(model, "default")] == ["head"]


@pytest.mark.parametrize("kind", ["batch first", "sequence first", "encoder"])
def test_each_sample_its_own(kind: str) -> None:
    model, x = make_encoder(kind), torch.randn(3, 3, 16)  # as many tokens as samples
    samples = 1 if kind == "sequence first" else 0
    peftcore.apply(model, "lora", r=2, target_modules=["self_attn"])
    disturb(model, "default", seed=0)
    adapted, names = first(model(x)), ["default", None, "default"]
    with peftcore.disabled(model):
        base = first(model(x))
    peftcore.activate(model, names, per_sample=True)
    actual = first(model(x))
    for sample, name in enumerate(names):
        expected = adapted if name else base
        torch.testing.assert_close(actual.select(samples, sample), expected.select(samples, sample))


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_files_of_a_later_peft_are_refused(tmp_path: Path) -> None:
    """Up to 0.21.2 it adds the change of `out_proj` twice. What comes then is not known."""
    model = peftcore.apply(make_encoder("batch first"), "lora", r=2)
    peftcore.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tiny.without_hash(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"format": "pt"})
    for version, refused in (("0.21.2", False), ("0.22.0.dev0", True)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))
        if refused:
            with pytest.raises(peftcore.CheckpointError, match=r"written by PEFT 0\.22\.0\.dev0.*remove peft_version"):
                peftcore.load(make_encoder("batch first"), tmp_path)
        else:
            peftcore.load(make_encoder("batch first"), tmp_path)
