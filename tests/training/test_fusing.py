"""Fused norms and gates: the same losses and gradients, fewer kept activations, and the model's own classes back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from support import tiny
from support.counted_dropout import CountedDropout
from support.releases import BEFORE_5_24
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore import ops
from peftcore.engine.adaptation.fused_forward import FUSED_FORWARD, fused_modules, is_fused
from peftcore.model.base_modules import original_class
from peftcore.ops import _triton
from peftcore.plugin import Adapter, Around


class Doubled(Adapter):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return self.factor * base(x)


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


BOTH = {"RMSNorm": 5, "attention": 2, "gated MLP": 2}  # of two layers


def family(name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes)).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def step(model: Any) -> dict[str, Tensor]:
    """Return the loss and all gradients of a training step."""
    model.train().zero_grad()
    torch.manual_seed(0)  # of dropout
    loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys() and len(one) > 1
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance * float(value.abs().max()), msg=name)


def lora(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    peftcore.apply(model, "lora", r=4, target_modules="all-linear", lora_dropout=0.2, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", BOTH),
        ("gemma2", {"RMSNorm": 9, "gated MLP": 2}),  # whose attention is eager
        ("qwen3", {"RMSNorm": 9, "attention": 2, "gated MLP": 2}),
        ("olmo2", {"RMSNorm": 9, "attention": 2, "gated MLP": 2}),
    ],
)
def test_a_step(name: str, kinds: dict[str, int], dtype: torch.dtype) -> None:
    model = lora(family(name, dtype))
    if name == "gemma2" and BEFORE_5_24:  # gives its attention to PyTorch, without the cap
        kinds = {**kinds, "attention": 2}
    own, wanted = classes(model), step(model)
    assert peftcore.fuse(model) is model
    assert fused_modules(model) == kinds
    same(step(model), wanted, 1e-5 if dtype is torch.float32 else 4e-2)
    peftcore.fuse(model, enabled=False)
    assert classes(model) == own and not any(FUSED_FORWARD in module.__dict__ for module in model.modules())
    same(step(model), wanted, 1e-7)


def test_all_parameters_trained() -> None:
    """The weights of norms, too."""
    model = family()
    wanted = step(model)
    same(step(peftcore.fuse(model)), wanted)
    assert any("norm" in name for name in wanted)


def test_fewer_kept_activations() -> None:
    def kept(model: Any) -> int:
        sizes: dict[int, int] = {}
        held = []
        parameters = {p.data_ptr() for p in model.parameters()}

        def keep(t: Tensor) -> Tensor:
            held.append(t)
            if t.data_ptr() not in parameters:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.train()(input_ids=tiny.TOKENS).logits.sum()
        return sum(sizes.values())

    model = lora(family(dtype=torch.bfloat16))
    before = kept(model)
    rows, layers = tiny.TOKENS.numel(), 2
    norms, gates = 2 * layers * rows * 32 * 2, layers * rows * 48 * 2  # bf16 in place of fp32; act(gate)
    assert kept(peftcore.fuse(model)) <= before - norms - gates


@pytest.mark.parametrize("first", ["fuse", "apply"])
def test_adapters_before_and_after(first: str) -> None:
    model, wanted = family(), step(lora(family()))
    own = classes(model)
    if first == "fuse":
        lora(peftcore.fuse(model))
    else:
        peftcore.fuse(lora(model))
    assert fused_modules(model) == BOTH and "fused: 5 x RMSNorm, 2 x attention, 2 x gated MLP" in str(
        peftcore.summary(model)
    )
    same(step(model), wanted)
    peftcore.merge(model, undo=True)
    peftcore.unmerge(model)
    peftcore.remove(model, "default")
    assert fused_modules(model) == BOTH
    assert [original_class(module) for module in model.modules()] == own
    peftcore.fuse(model, enabled=False)
    assert classes(model) == own


def test_an_adapter_at_a_norm_and_around_an_mlp() -> None:
    def placements(model: nn.Module, *_: Any) -> list[Any]:
        ends = "layers.0.input_layernorm", "layers.1.mlp"
        return [Around(path, Doubled()) for path, _ in model.named_modules() if path.endswith(ends)]

    with tiny.installed(tiny.method("doubled", placements)):
        wanted = family()
        peftcore.apply(wanted, "doubled")
        for fused_first in (True, False):
            model = peftcore.fuse(family()) if fused_first else family()
            peftcore.apply(model, "doubled")
            same(step(peftcore.fuse(model)), step(wanted), 1e-3)  # sums of both signs
            assert fused_modules(model) == {"RMSNorm": 4, "activation": 1, "attention": 2, "gated MLP": 1}
            peftcore.remove(model, "default")
            assert fused_modules(peftcore.fuse(model)) == BOTH


def test_copies_and_files() -> None:
    model = peftcore.fuse(lora(family()))
    assert model.state_dict().keys() == lora(family()).state_dict().keys()
    wanted, buffer = step(model), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert fused_modules(other) == BOTH
        same(step(other), wanted, 1e-7)


def test_hooks_and_replaced_children() -> None:
    model: Any = peftcore.fuse(family())
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    seen: list[str] = []
    for name, module in (("gate", mlp.gate_proj), ("act", mlp.act_fn), ("mlp", mlp), ("norm", norm)):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    step(model)
    assert seen == ["gate", "act", "mlp", "norm"]
    plain, x = family(), torch.randn(2, 32)
    for each in (model, plain):
        each.model.layers[1].mlp.up_proj = nn.Identity()
        each.model.layers[1].mlp.gate_proj = nn.Identity()
        each.model.layers[1].mlp.down_proj = nn.Identity()
    torch.testing.assert_close(model.model.layers[1].mlp(x), plain.model.layers[1].mlp(x))


def test_changed_settings_and_dtypes() -> None:
    model: Any = peftcore.fuse(family())
    plain: Any = family()
    for each in (model, plain):
        each.model.norm.variance_epsilon = 0.5
        each.model.layers[0].mlp.act_fn = nn.ReLU()
        each.model.layers[1].input_layernorm.double()
    x = torch.randn(2, 3, 32)
    for path in ("norm", "layers.0.mlp", "layers.1.input_layernorm"):
        torch.testing.assert_close(model.model.get_submodule(path)(x), plain.model.get_submodule(path)(x))
    same(step(model.bfloat16().float()), step(plain.bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        same(step(model), step(plain), 4e-2)


def test_compiled_models_compute_their_own_forward() -> None:
    model = peftcore.fuse(family())
    wanted = step(model)
    found: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    same(
        step(torch.compile(model, backend=backend)),
        {f"_orig_mod.{n}" if n != "loss" else n: g for n, g in wanted.items()},
    )
    assert found and not any("peftcore" in name for name in found)


def test_checkpointing_and_second_gradients() -> None:
    model: Any = peftcore.fuse(lora(family()))
    layer, x = model.model.layers[1].eval(), torch.randn(3, 32, requires_grad=True)
    for module in (layer.mlp, layer.input_layernorm):
        (wanted,) = torch.autograd.grad(module(x).pow(2).sum(), x)
        for reentrant in (False, True):
            checkpoint(module, x, use_reentrant=reentrant).pow(2).sum().backward()
            assert torch.equal(x.grad, wanted)  # type: ignore[arg-type]
            x.grad = None
    norm = model.model.norm
    x = torch.randn(3, 32, requires_grad=True)
    (dx,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    plain = peftcore.fuse(model, enabled=False)
    (dx,) = torch.autograd.grad(plain.model.norm(x).pow(3).sum(), x, create_graph=True)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(second, torch.autograd.grad(dx.sum(), x)[0], rtol=1e-4, atol=1e-4)


def test_models_without_such_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.ReLU(), nn.Dropout(0.0), nn.Softmax(-1))
    own = classes(model)
    assert classes(peftcore.fuse(model)) == own and fused_modules(model) == {}
    assert not any(is_fused(module) for module in model.modules()) and "fused" not in str(peftcore.summary(model))


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x) ** 2


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "quick_gelu", "silu", "relu", "gelu_pytorch_tanh"])
def test_activations(name: str) -> None:
    from transformers.activations import ACT2FN

    model = nn.Sequential(nn.Linear(8, 600), ACT2FN[name], Squared())
    x, seen = torch.randn(50, 8), []
    for enabled in (False, True):
        peftcore.fuse(model, enabled=enabled)
        y = model(x)
        seen.append([y, *torch.autograd.grad(y.sum(), list(model.parameters()))])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert fused_modules(model) == ({} if name == "relu" else {"activation": 1})
    assert ("_Activated" in str(y.grad_fn)) == ("_Activated" in str(model[1](x).grad_fn))


def test_dropout_modules() -> None:
    class Half(nn.Dropout):
        pass

    model = peftcore.fuse(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), Half(0.5)))
    assert fused_modules(model) == {"dropout": 2}  # of which one has PyTorch's results
    x = torch.randn(9, 70, requires_grad=True)
    torch.manual_seed(1)
    y = model[0](x)
    torch.manual_seed(1)
    assert torch.equal(y, ops.dropout(x, 0.5)) and type(y.grad_fn).__name__ == "_DropoutBackward"
    z = x.detach().clone()
    assert model[1](z) is z and model[0].eval()(z) is z and model[0].train()(z[0, 0]).dim() == 0
    again = checkpoint(model[0], x, use_reentrant=False)
    (found,) = torch.autograd.grad(again.sum(), x)
    assert torch.equal(found != 0, again != 0)


@pytest.mark.parametrize("case", ["bf16", "fp32", "dropout", "no gradient"])
def test_attention_of_a_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftcore.engine.adaptation import fused_attention

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=1)
    config.attention_dropout = 0.1 if case == "dropout" else 0.0
    model: Any = LlamaForCausalLM(config).to(torch.float32 if case == "fp32" else torch.bfloat16).train()
    seen = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        return attention(*args, **kwargs)

    attention = fused_attention.ops.attention
    monkeypatch.setattr(fused_attention.ops, "attention", counted)
    mask = torch.ones_like(tiny.TOKENS)
    mask[0, :2] = 0  # padding
    for given in ({}, {"attention_mask": mask}):
        wanted, found = [], []
        for into, enabled in ((wanted, False), (found, True)):
            peftcore.fuse(model, enabled=enabled)
            torch.manual_seed(0)
            with CountedDropout(), torch.set_grad_enabled(case != "no gradient"):
                loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS, **given).loss
            into.append(loss.detach())
            if case != "no gradient":
                into.extend(torch.autograd.grad(loss, list(model.parameters())))
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).norm() <= 3e-2 * other.norm()
    available = ops.extension is not None and ops.extension.has_attention(str(model.dtype))
    assert len(seen) == (4 if available else 0)


@pytest.mark.parametrize(
    ("devices", "supported", "fused"),
    [
        (("cpu", "meta", "cuda"), True, True),
        (("cpu", "meta", "cuda"), False, False),  # before Ampere
        (("cpu", "meta"), True, False),  # without Triton
    ],
)
def test_norms_and_gates_are_fused_on_gpus_with_triton(
    devices: tuple[str, ...], supported: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_triton, "DEVICES", devices)
    monkeypatch.setattr(_triton, "is_supported", lambda device: supported)
    layer: Any = peftcore.fuse(family(dtype=torch.bfloat16)).model.layers[0]
    with torch.no_grad(), FakeTensorMode(), Operators() as operators:
        for module in (*layer.input_layernorm.modules(), *layer.mlp.modules()):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                    )
        layer.mlp(layer.input_layernorm(torch.empty(8, 32, dtype=torch.bfloat16, device="cuda")))
    assert ({"peftcore::rms_norm", "peftcore::gated"} <= operators.names) == fused
