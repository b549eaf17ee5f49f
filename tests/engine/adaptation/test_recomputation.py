"""What layers are given by fused modules is not kept for their gradient, and gradients are the same bit for bit."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support.checkpointing import enable_checkpointing
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore import ops
from peftcore.engine.adaptation.recomputation import inputs_instead, with_source

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, tuple[str, Any]] = {  # and paths of layers that norms, gates and activations are given to
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SIZES, vocab_size=96)),
    "bert": ("BertForSequenceClassification", transformers.BertConfig(**SIZES, vocab_size=96)),
    "vit": ("ViTForImageClassification", transformers.ViTConfig(**SIZES, image_size=16, patch_size=8)),
}
READERS = {
    "llama": ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"),
    "bert": (
        "encoder.layer.1.attention.self.key",
        "encoder.layer.1.intermediate.dense",
        "encoder.layer.1.output.dense",
    ),
    "vit": ("layers.1.attention.q_proj", "layers.1.mlp.fc1", "layers.1.mlp.fc2"),
}


@functools.cache
def weights(family: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = made(family)
    return {name: value + 0.05 * torch.randn(value.shape) for name, value in model.state_dict().items()}


def made(family: str) -> Any:
    name, config = FAMILIES[family]
    return getattr(transformers, name)(config)


def model_of(family: str, method: str | None = "lora", dtype: torch.dtype = torch.float32) -> Any:
    model = made(family)
    model.load_state_dict(weights(family))
    model.to(dtype).train()
    if method is not None:
        torch.manual_seed(1)
        peftcore.apply(model, method, target_modules="all-linear")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def inputs_of(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        pixels = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    tokens = torch.randint(96, (2, 7), generator=generator)
    return {"input_ids": tokens, "labels": tokens if family == "llama" else torch.tensor([0, 1])}


def given_to(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, StorageWeakRef]:
    """Return the output of `run`, and a reference to the storage of what `layer` is given in it."""
    seen: list[StorageWeakRef] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage())))
    output = run()
    hook.remove()
    return output, seen[-1]


def gradients(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(2)  # of dropout
    loss = model(**inputs).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *(g for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None)]


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 1
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_equal_bit_for_bit(family: str, method: str, dtype: torch.dtype) -> None:
    model, inputs = model_of(family, method, dtype), inputs_of(family, dtype)
    wanted = gradients(peftcore.fuse(model, recompute="none"), inputs)
    same(gradients(peftcore.fuse(model), inputs), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_layers_are_not_kept(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    for recompute in ("none", "auto"):
        peftcore.fuse(model, recompute=recompute)
        for path in READERS[family]:
            layer = next(module for name, module in model.named_modules() if name.endswith(path))
            loss, given = given_to(layer, lambda: model(**inputs).loss)
            assert given.expired() == (recompute == "auto"), path
            del loss


def test_an_output_is_computed_again_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = peftcore.fuse(model_of("llama")), inputs_of("llama")
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return norm(*args, **kwargs)

    norm = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", counted)
    loss = model(**inputs).loss
    assert len(calls) == 5
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    assert len(calls) == 8  # the first layer's first norm has no gradient, the last norm no adapted layer
    same(list(torch.autograd.grad(loss, trained)), list(first))
    assert len(calls) == 11


def test_a_trained_norm_and_a_head() -> None:
    model = model_of("llama", None)
    peftcore.apply(model, "lora", target_modules=["q_proj", "lm_head"], modules_to_save=["norm", "input_layernorm"])
    inputs = inputs_of("llama")
    wanted = gradients(peftcore.fuse(model, recompute="none"), inputs)
    same(gradients(peftcore.fuse(model), inputs), wanted)


@pytest.mark.parametrize("trained", ["lora", "all"])
def test_products_of_gates(trained: str) -> None:
    """Without adapters, too."""
    mlp: Any = model_of("llama", "lora" if trained == "lora" else None).model.layers[0].mlp
    x = torch.randn(2, 3, 32, requires_grad=True)
    parameters = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    found = []
    for recompute in ("none", "auto"):
        peftcore.fuse(mlp, recompute=recompute)
        output, product = given_to(mlp.down_proj, lambda: mlp(x))
        assert product.expired() == (recompute == "auto")
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), parameters)])
    same(*found)


def test_within_other_hooks() -> None:
    """Checkpointing and offloading keep what they are given, or compute it again: a module's input is not kept."""
    model: Any = peftcore.fuse(model_of("llama"))
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 3, 32, requires_grad=True)
    (wanted,) = torch.autograd.grad(mlp.eval()(x).square().sum(), x)
    outputs: list[StorageWeakRef] = []
    mlp.gate_proj.register_forward_hook(lambda *given: outputs.append(StorageWeakRef(given[2].untyped_storage())))
    for reentrant in (False, True):
        output = checkpoint(mlp, x, use_reentrant=reentrant)
        assert outputs[-1].expired()
        output.square().sum().backward()
        assert torch.equal(x.grad, wanted)
        x.grad = None
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(torch.autograd.grad(mlp(x).square().sum(), x)[0], wanted)
    (slope,) = torch.autograd.grad(mlp(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(slope, wanted)


def test_checkpointed_models() -> None:
    model, inputs = peftcore.fuse(model_of("llama")), inputs_of("llama")
    wanted = gradients(model, inputs)
    enable_checkpointing(model)
    same(gradients(model, inputs), wanted)


def test_second_gradients() -> None:
    layers: Any = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, bias=False))
    peftcore.apply(layers, "dora", target_modules=["1"])
    x, found = torch.randn(5, 8, requires_grad=True), []
    for recompute in ("none", "auto"):
        peftcore.fuse(layers, recompute=recompute)
        (dx,) = torch.autograd.grad(layers(x).pow(3).sum(), x, create_graph=True)
        found.append([dx.detach(), torch.autograd.grad(dx.pow(2).sum(), x)[0]])
    same(*found)


def test_outputs_that_are_changed_are_kept() -> None:
    layers: Any = peftcore.fuse(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    peftcore.apply(layers, "lora", target_modules=["1"], init_lora_weights=False)
    layers[0].register_forward_hook(lambda *given: given[2].mul_(2))
    x, found = torch.randn(5, 8, requires_grad=True), []
    trained = [x, *(p for p in layers.parameters() if p.requires_grad)]
    for recompute in ("none", "auto"):
        peftcore.fuse(layers, recompute=recompute)
        found.append(list(torch.autograd.grad(layers(x).square().sum(), trained)))
    same(*found)


def test_a_weight_that_is_freed_after_the_forward_pass() -> None:
    """As ranks free their sharded weights: an output is computed again with the weight that it had."""
    layers: Any = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    peftcore.apply(layers, "lora", target_modules=["1"], init_lora_weights=False)
    x, found = torch.randn(5, 8, requires_grad=True), []
    trained = [p for p in layers.parameters() if p.requires_grad]
    for recompute in ("none", "auto"):
        peftcore.fuse(layers, recompute=recompute)
        loss, weight = layers(x).square().sum(), layers[0].weight
        value = weight.data.clone()
        weight.data.zero_()
        found.append(list(torch.autograd.grad(loss, trained)))
        weight.data.copy_(value)
    same(*found)


@pytest.mark.parametrize("change", [Tensor.t, lambda y: y[:, :4]], ids=["transposed", "part"])
def test_views_of_another_order_or_size_are_kept(change: Callable[[Tensor], Tensor]) -> None:
    x, w, found = torch.randn(8, 8, requires_grad=True), torch.randn(8, 3, requires_grad=True), []
    for source in (lambda y: y, lambda y: with_source(y, lambda x: 2 * x, (x,))):
        y = source(2 * x)
        with inputs_instead(y):
            z = change(y) @ w[: change(y).shape[1]]
        found.append(list(torch.autograd.grad(z.square().sum(), (x, w))))
    same(*found)


def test_files_of_outputs() -> None:
    layers: Any = peftcore.fuse(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    peftcore.apply(layers, "lora", target_modules=["1"])
    y, buffer = layers[0](torch.randn(5, 8, requires_grad=True)), io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)
    assert torch.equal(read, y) and torch.equal(layers[1](read), layers[1](y))


def test_mixed_precision() -> None:
    """A norm in autocast is computed in fp32, and not again."""
    model, inputs = model_of("bert"), inputs_of("bert")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = gradients(peftcore.fuse(model, recompute="none"), inputs)
        same(gradients(peftcore.fuse(model), inputs), wanted)


def test_an_input_that_is_changed_before_its_gradient() -> None:
    mlp: Any = peftcore.fuse(model_of("llama", None)).model.layers[0].mlp
    outputs: list[Tensor] = []
    mlp.gate_proj.register_forward_hook(lambda *given: outputs.append(given[2]))
    loss = mlp(torch.randn(2, 32)).sum()
    with torch.no_grad():
        outputs[0].add_(1)
    with pytest.raises(RuntimeError, match="the input of a fused module was changed in place after the forward pass"):
        loss.backward()


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="recompute must be one of auto, none, found 'all'"):
        peftcore.fuse(nn.Linear(2, 2), recompute="all")  # type: ignore[arg-type]
