"""Whole models: which layers, tied and shared weights, Conv1D, bitsandbytes' layers, and what is refused."""

import gc
import mmap
import weakref

import bitsandbytes as bnb
import pytest
import torch
from support import tiny
from support.quantized import INPUTS, gpt2, llama, logits, of_bnb
from torch import nn

import peftcore
from peftcore.model.base_modules import original_class
from peftcore.model.weight_formats import weight_format
from peftcore.ops import huge_pages
from peftcore.plugin.registry import registry
from peftcore.quantization import QuantizedLinear, convert, quantized_layers


def kinds(model):
    return {path for path, _ in quantized_layers(model)}


def test_linears_are_quantized_and_the_head_is_not():
    model = peftcore.quantize(llama())
    assert len(kinds(model)) == 14 and original_class(model.lm_head) is nn.Linear
    assert all(path.startswith("model.layers.") for path in kinds(model))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in llama().named_parameters() if "norm" in n or "embed" in n or "lm_head" in n
    }
    error = (logits(model) - logits(llama())).norm() / logits(llama()).norm()
    assert 0 < error < 0.2


def test_large_codes_are_moved_into_huge_pages(monkeypatch):
    """The codes of a model are moved together, shared ones once, and results are the same."""
    moved = []
    monkeypatch.setattr(convert, "move_to_huge_pages", lambda codes: moved.append(list(codes)))
    monkeypatch.setattr(convert, "collapse", moved.append)
    model = llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    head = model.lm_head.weight
    peftcore.quantize(model)
    assert moved[0] is head and len(moved) == 2
    assert [id(codes) for codes in moved[1]] == [id(layer.weight) for _, layer in quantized_layers(model)]
    assert len(moved[1]) == 11
    before = logits(model)
    monkeypatch.undo()
    monkeypatch.setattr(huge_pages, "_HUGE_PAGE", mmap.PAGESIZE)
    huge_pages.move_to_huge_pages(moved[1])
    assert torch.equal(logits(model), before)
    assert not huge_pages._huge_pages_enabled() or all(codes.data_ptr() in huge_pages._mappings for codes in moved[1])


def test_bits_per_weight():
    layer = peftcore.quantize(nn.Sequential(nn.Linear(512, 2048, bias=False)))[0]
    tensors = [layer.weight, layer.absmax, layer.nested_absmax, layer.nested_offset]
    assert 8 * sum(t.nbytes for t in tensors) / (512 * 2048) == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize(
    ("skip", "count"), [([], 15), (["lm_head"], 14), (["mlp"], 9), (["model.layers.0", "lm_head"], 7)]
)
def test_skipping(skip, count):
    assert len(kinds(peftcore.quantize(llama(), skip=skip))) == count


def test_a_tied_head_stays_dense_and_tied():
    model = peftcore.quantize(llama(tie_word_embeddings=True), skip=[])
    assert model.lm_head.weight is model.model.embed_tokens.weight and len(kinds(model)) == 14


def test_a_layer_that_shares_the_weight_of_one_that_stays_dense_does_too():
    """A head within the layers, such as the one by which Granite Speech's encoder corrects itself."""
    model = nn.ModuleDict({"inside": nn.Linear(64, 64), "head": nn.Linear(64, 64), "other": nn.Linear(64, 64)})
    model["head"].weight = model["inside"].weight
    peftcore.quantize(model, skip=["head"])
    assert original_class(model["inside"]) is original_class(model["head"]) is nn.Linear
    assert model["inside"].weight is model["head"].weight
    assert isinstance(model["other"], QuantizedLinear)


def test_two_layers_with_one_weight_keep_one():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    peftcore.quantize(model)
    assert model[0].weight is model[1].weight and model[0].weight.dtype == torch.uint8
    model.to(torch.bfloat16)
    assert model[0].weight is model[1].weight
    peftcore.dequantize(model)
    assert model[0].weight is model[1].weight and model[0].weight.dtype == torch.float32


def test_a_module_at_two_paths_is_quantized_once():
    layer = nn.Linear(64, 64)
    model = peftcore.quantize(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2] is layer and isinstance(layer, QuantizedLinear)


def test_a_conv1d_is_transposed():
    model = peftcore.quantize(gpt2())
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, QuantizedLinear) and (layer.in_features, layer.out_features) == (64, 192)
    dense = gpt2().transformer.h[0].attn.c_attn
    assert (layer.dequantized() - dense.weight.T).abs().max() < 0.2 * dense.weight.abs().max()
    wanted = logits(gpt2())
    assert (logits(model) - wanted).norm() < 0.1 * wanted.norm()
    assert len(kinds(model)) == 8


def test_what_the_model_asks_to_keep_stays_dense():
    model = peftcore.quantize(tiny.t5())
    assert "encoder.block.0.layer.1.DenseReluDense.wo" not in kinds(model) and len(kinds(model)) > 10


def test_a_classifiers_head_stays_dense():
    model = peftcore.quantize(tiny.bert_classifier())
    assert original_class(model.classifier) is nn.Linear and len(kinds(model)) == 13


def test_a_layer_that_its_parent_asks_for_its_dtype_stays_dense():
    """ColPali brings hidden states to `embedding_proj_layer.weight.dtype`, which would be that of bytes."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.last(self.first(x).to(self.last.weight.dtype))

    with pytest.warns(UserWarning, match="of Parent dense: 'last', because other code reads the weight's dtype"):
        model = peftcore.quantize(Parent())
    assert isinstance(model.first, QuantizedLinear) and not isinstance(model.last, QuantizedLinear)
    assert model(torch.randn(2, 32)).isfinite().all()


def test_dense_weights_are_freed_one_by_one():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    alive = [weakref.ref(layer.weight) for layer in model]
    peftcore.quantize(model)
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_quantizing_again_changes_nothing():
    model = peftcore.quantize(llama(), skip=["mlp", "lm_head"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peftcore.quantize(model)
    after = model.state_dict()
    assert len(kinds(model)) == 14
    assert all(torch.equal(after[name], value) for name, value in before.items() if "self_attn" in name)


def test_layers_of_bitsandbytes_are_taken_over():
    model = llama()
    bits = {}
    for path in kinds(peftcore.quantize(llama())):
        layer = of_bnb(model.get_submodule(path))
        bits[path] = layer.state_dict()
        model.set_submodule(path, layer)
    with pytest.raises(peftcore.PeftcoreError, match=r"Call peftcore.quantize\(model\) before apply, which keeps"):
        weight_format(model.get_submodule("model.layers.0.mlp.up_proj"))
    peftcore.quantize(model)
    assert kinds(model) == set(bits)
    for path, state in bits.items():
        found = model.get_submodule(path).state_dict()
        assert all(torch.equal(found[name], value) for name, value in state.items() if "quant_state" not in name)
    assert torch.isfinite(logits(model)).all()


def test_a_layer_of_bitsandbytes_without_bits_leaves_the_model_as_it_was():
    model = llama()
    for number, layer in enumerate(model.model.layers):
        layer.mlp.up_proj = of_bnb(layer.mlp.up_proj) if number == 0 else bnb.nn.Linear4bit(64, 128, bias=False)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(peftcore.PeftcoreError, match=r"'model.layers.1.mlp.up_proj' is a bitsandbytes layer that has"):
        peftcore.quantize(model)
    assert [type(module) for module in model.modules()] == classes


def test_dequantize_gives_plain_layers_with_the_same_values():
    model = peftcore.quantize(llama())
    wanted = logits(model)
    peftcore.dequantize(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert list(model.state_dict()) == list(llama().state_dict())
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    assert not hasattr(model.config, "quantization_config")
    assert peftcore.dequantize(peftcore.quantize(llama()), torch.bfloat16).lm_head.weight.dtype == torch.float32


def test_the_config_says_what_bitsandbytes_needs():
    model = peftcore.quantize(llama(torch.bfloat16), double_quant=False)
    fields = model.config.quantization_config
    assert fields["quant_method"] == "bitsandbytes" and fields["load_in_4bit"] is True
    assert (fields["bnb_4bit_quant_type"], fields["bnb_4bit_use_double_quant"]) == ("nf4", False)
    assert fields["bnb_4bit_compute_dtype"] == "bfloat16" and fields["llm_int8_skip_modules"] == ["lm_head"]


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = peftcore.quantize(llama())
    assert len(kinds(model)) == 14 and all(p.is_meta for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 0), (0, 3), (33, 65)])
def test_odd_and_empty_layers(shape):
    layer = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        layer.bias.fill_(1.0)
    model = peftcore.quantize(nn.Sequential(layer))
    x = torch.randn(2, shape[1])
    torch.testing.assert_close(model(x), x @ model[0].dequantized().T + 1)
    other = QuantizedLinear(shape[1], shape[0])
    other.load_state_dict(model[0].state_dict())
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("view", [lambda w: w.T.contiguous().T, lambda w: torch.stack([w, w], 2)[..., 0]])
def test_weights_that_are_not_contiguous(view):
    layer = nn.Linear(64, 48)
    wanted = peftcore.quantize(nn.Sequential(nn.Linear(64, 48)))
    wanted[0].load_state_dict(layer.state_dict())
    layer.weight = nn.Parameter(view(layer.weight.detach()))
    assert torch.equal(peftcore.quantize(nn.Sequential(layer))[0].weight, wanted[0].weight)


@pytest.mark.parametrize(("value", "shown"), [(torch.nan, "nan"), (-torch.inf, "-inf")])
def test_non_finite_values_are_named_and_nothing_is_changed(value, shown):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    message = rf"'model.layers.1.mlp.up_proj.weight' contains {shown} at index \[3, 5\]"
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.quantize(model)
    assert kinds(model) == set() and not hasattr(model.config, "quantization_config")
    assert len(kinds(peftcore.quantize(model, skip=["layers.1", "lm_head"]))) == 7


def of_dtype(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (lambda: of_dtype(torch.int8), {}, r"'0.weight' is torch.int8; only float32"),
        (lambda: of_dtype(torch.float64), {}, r"'0.weight' is torch.float64"),
        (llama, {"quant_type": "nf3"}, r"unknown quant_type 'nf3'. Choose one of: nf4, fp4"),
        (llama, {"blocksize": 48}, r"a power of two from 32 to 4096, found 48"),
        (llama, {"blocksize": 8192}, r"found 8192"),
        (llama, {"blocksize": 64.0}, r"found 64.0"),
        (llama, {"skip": ["lm_heads"]}, r"skip: 'lm_heads' matches no module \(nearest: 'lm_head'"),
        (llama, {"skip": "lm_head"}, r"skip=\['lm_head'\]"),
        (lambda: nn.Sequential(nn.ReLU()), {}, r"Sequential has no linear layer to quantize"),
    ],
)
def test_what_is_refused(model, fields, message):
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.quantize(model(), **fields)


@pytest.mark.parametrize("quant_type", ["8da4w", "8da4w-g128"])
def test_a_type_of_a_package_that_is_not_installed(quant_type, monkeypatch):
    plugins = [each for each in registry.plugins() if each.name != "8da4w"]
    monkeypatch.setattr(registry, "offered", lambda *_: {})
    monkeypatch.setattr(registry, "plugins", lambda: plugins)
    with pytest.raises(
        peftcore.PeftcoreError,
        match=f"quant_type='{quant_type}' is in a package that is not installed. Run in .*: pip install "
        "./plugins/peftcore-8da4w",
    ):
        peftcore.quantize(llama(), quant_type)


@pytest.mark.usefixtures("toys")
def test_adapters_come_after():
    model = peftcore.apply(llama(), "around")
    for change in (peftcore.quantize, peftcore.dequantize):
        with pytest.raises(peftcore.PeftcoreError, match="a model with adapters"):
            change(model)
    peftcore.remove(model)
    peftcore.apply(peftcore.quantize(model), "around")
    model(**INPUTS).logits.sum().backward()
    gain = model.model.layers[0].self_attn.q_proj.peftcore["default"].gain
    assert gain.dtype == torch.float32 and gain.grad is not None


def test_a_compiled_model_and_hooked_layers_are_refused():
    with pytest.raises(peftcore.PeftcoreError, match="compiled"):
        peftcore.quantize(torch.compile(llama(), backend="eager"))
    model = llama()
    model.model.layers[0].mlp.up_proj.forward = lambda x: x
    with pytest.raises(peftcore.PeftcoreError, match=r"'model.layers.0.mlp.up_proj' has its own `forward`"):
        peftcore.quantize(model)


def test_a_summary_counts_weights_not_bytes():
    model = llama()
    count = sum(p.numel() for p in model.parameters())
    peftcore.quantize(model)
    found = peftcore.summary(model)
    assert found.base_parameters == peftcore.plan(model, "lora").base_parameters == count
    assert found.base_bytes < 4 * count
