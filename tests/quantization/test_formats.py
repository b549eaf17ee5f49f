"""Models in MXFP4, NVFP4 and affine4: layers and experts, copies and files, merging, and the estimate."""

from __future__ import annotations

import ast
import copy
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import tiny
from support.mixtures import INPUTS as TOKENS, mixture
from support.quantized import INPUTS, llama, logits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import peftcore
from peftcore import ops
from peftcore.ops.weight import PackedWeight
from peftcore.quantization import QuantizedLinear, quantized_experts, quantized_layers
from peftcore.quantization.convert import convert
from peftcore.quantization.formats import from_tensors, to_tensors
from peftcore.testing import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Format(NamedTuple):
    """A format, the bits of a weight in blocks of `blocksize`, and the options of `peftcore.quantize`."""

    quant_type: str
    quantize: Callable[[Tensor], PackedWeight]
    bits: float
    options: dict[str, Any]
    blocksize: int = 32


MXFP4 = Format("mxfp4", ops.quantize_mxfp4, 4.25, {})
AFFINE4 = Format("affine4", lambda weight: ops.quantize_affine4(weight, 32), 4.75, {"blocksize": 32})
NVFP4 = Format("nvfp4", ops.quantize_nvfp4, 4.5, {}, 16)
FORMATS = pytest.mark.parametrize("form", [MXFP4, NVFP4, AFFINE4], ids=lambda form: form.quant_type)


def quantized(form: Format, model: nn.Module) -> nn.Module:
    return peftcore.quantize(model, form.quant_type, **form.options)


def act_order(model: nn.Module) -> nn.Module:
    """Give every affine4 layer permuted inputs, as a checkpoint with `g_idx` has."""
    for _, layer in quantized_layers(model):
        order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(0))
        weight = layer.dequantized(torch.float32)[:, order]
        layer.set_packed_parameter("weight", ops.quantize_affine4(weight, 32)._replace(permutation=order))
    return model


MODELS = {
    "mxfp4": (MXFP4, lambda: quantized(MXFP4, llama())),
    "nvfp4": (NVFP4, lambda: quantized(NVFP4, llama())),
    "affine4": (AFFINE4, lambda: quantized(AFFINE4, llama())),
    "permuted inputs": (AFFINE4, lambda: act_order(quantized(AFFINE4, llama()))),
}
EACH_MODEL = pytest.mark.parametrize(("form", "made"), MODELS.values(), ids=MODELS)


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**TOKENS).logits


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@EACH_MODEL
def test_layers_are_quantized_and_computed_from_their_bits(form: Format, made: Callable[[], nn.Module]) -> None:
    model, dense = made(), llama()
    assert len(list(quantized_layers(model))) == 14
    for path, layer in quantized_layers(model):
        dense.get_submodule(path).weight.data = layer.dequantized(torch.float32)
        assert layer.packed.quant_type == form.quant_type and layer.blocksize == form.blocksize
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    assert 0 < (logits(model) - logits(llama())).norm() / logits(llama()).norm() < 0.25
    layer = model.model.layers[0].mlp.up_proj
    stored = [t for name, t in layer.named_buffers() if name in ("absmax", "zeros")]
    stored_bytes = layer.weight.nbytes + sum(t.nbytes for t in stored)
    assert 8 * stored_bytes == form.bits * layer.in_features * layer.out_features
    assert repr(layer).endswith(f"{form.quant_type}, blocksize={form.blocksize})")


@EACH_MODEL
def test_copies_pickles_and_files_keep_the_bits(form: Format, made: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = made()
    state = bits(model)
    same(bits(copy.deepcopy(model)), state)
    layer = model.model.layers[0].mlp.up_proj
    same(bits(pickle.loads(pickle.dumps(layer))), bits(layer))
    other = QuantizedLinear(layer.in_features, layer.out_features, bias=False)  # of NF4, until it is loaded
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, layer.in_features)
    assert other.quant_type == form.quant_type and torch.equal(other(x), layer(x))
    assert f"weight.quant_state.peftcore__{form.quant_type}" in layer.state_dict()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again = quantized(form, llama())
    again.load_state_dict(torch.load(buffer))
    assert torch.equal(logits(again), logits(model))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_type"]) == ("peftcore_4bit", form.quant_type)
    for loaded in (peftcore.quantization.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        same(bits(loaded), state)
        assert torch.equal(logits(loaded), logits(model))
    dense = {name for name, t in state.items() if t.is_floating_point() and not name.endswith(".nested_absmax")}
    cast = {name: t.bfloat16() if name in dense else t for name, t in state.items()}
    same(bits(model.to(torch.bfloat16)), cast)


@EACH_MODEL
def test_lora_trains_and_merges(form: Format, made: Callable[[], nn.Module]) -> None:
    model = peftcore.apply(made(), "qlora", r=4, init_lora_weights=False)
    assert {layer.quant_type for _, layer in quantized_layers(model)} == {form.quant_type}
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    before, adapted = bits(model), logits(model)
    assert max(peftcore.merge_error(model).values()) > 0
    peftcore.merge(model, dtype=torch.float32, undo=True)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    peftcore.unmerge(model)
    same(bits(model), before)
    with pytest.warns(UserWarning, match="14 merged layers loses"):
        peftcore.merge(model, max_error=1, undo=True)
    assert {layer.quant_type for _, layer in quantized_layers(model)} == {form.quant_type}
    peftcore.unmerge(model)
    same(bits(model), before)
    assert torch.equal(logits(model), adapted)


@FORMATS
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts(kind: str, form: Format, tmp_path: Path) -> None:
    """Blocks are parts of rows [in], also where the parameter is [experts, in, out]."""
    model, dense = quantized(form, mixture(kind)), mixture(kind)
    for path, experts in quantized_experts(model):
        for name in experts.packings:
            parameter, packed = dense.get_submodule(path).get_parameter(name), experts.packed_parameter(name)
            assert packed.turned == (kind == "gpt_oss")
            wanted = form.quantize(parameter.mT if packed.turned else parameter)
            for part in ("codes", "absmax", "nested_absmax", "zeros"):
                found = getattr(packed, part)
                assert (found is None) == (getattr(wanted, part) is None)
                assert found is None or torch.equal(found, getattr(wanted, part))
            parameter.data = experts.dequantized_parameter(name, torch.float32)
            assert parameter.shape == experts.packings[name].shape
    for path, layer in quantized_layers(model):
        dense.get_submodule(path).weight.data = layer.dequantized(torch.float32)
    torch.testing.assert_close(out(model), out(dense), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = peftcore.quantization.load(tmp_path)
    same(bits(loaded), bits(model))
    assert torch.equal(out(loaded), out(model))
    state = bits(model)
    model.load_state_dict(state)
    same(bits(model), state)
    same(bits(peftcore.dequantize(copy.deepcopy(model))), bits(dense))


@FORMATS
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_adapters_of_experts(kind: str, form: Format) -> None:
    """Low-rank products next to a format equal those next to a dense model with its values, as do merged ones."""
    model = quantized(form, mixture(kind))
    dense = peftcore.dequantize(copy.deepcopy(model))
    for each in (model, dense):
        torch.manual_seed(0)
        peftcore.apply(
            each, "lora", r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"],
            init_lora_weights=False,
        )  # fmt: skip
    torch.testing.assert_close(out(model), out(dense), rtol=1e-4, atol=1e-4)
    gradients = []
    for each in (model, dense):
        each(**TOKENS).logits.square().mean().backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    before = bits(model)
    peftcore.merge(model, dtype=torch.float32, undo=True)
    peftcore.merge(dense, undo=True)
    torch.testing.assert_close(out(model), out(dense), rtol=1e-4, atol=1e-4)
    peftcore.unmerge(model)
    same(bits(model), before)


@FORMATS
def test_a_dense_checkpoint_is_quantized_as_it_is_read(form: Format, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    loaded = peftcore.quantization.load(tmp_path, form.quant_type, **form.options)
    same(bits(loaded), bits(quantized(form, llama())))


DAMAGES: list[tuple[Format, Callable[[dict[str, Tensor]], Any], str]] = [
    (MXFP4, lambda t: t.update(absmax=t["absmax"].float()), r"torch.float32 \[8\], expected torch.uint8 \[8\]"),
    (MXFP4, lambda t: t["absmax"].fill_(255), "has a scale of NaN"),
    (NVFP4, lambda t: t["absmax"][3:].fill_(127), "has a scale of NaN"),
    (NVFP4, lambda t: t.pop("nested_absmax"), "lacks 'w.nested_absmax'"),
    (NVFP4, lambda t: t["nested_absmax"].fill_(1e38), "too large for float32"),
    (NVFP4, lambda t: t.update(nested_quant_map=torch.ones(16)), r"'nested_quant_map' torch.float32 \[16\]"),
    (NVFP4, lambda t: t.update(nested_quant_map=torch.full((256,), torch.inf)), "expected finite values"),
    (AFFINE4, lambda t: t.update(absmax=t["absmax"].double()), "'absmax' torch.float64"),
    (AFFINE4, lambda t: t["absmax"].fill_(torch.nan), "has NaN or Inf in 'absmax'"),
    (AFFINE4, lambda t: t.update(zeros=t["zeros"][:3]), r"'zeros' torch.uint8 \[3\], expected torch.uint8 \[8\]"),
    (
        AFFINE4,
        lambda t: t.update(permutation=torch.zeros(64, dtype=torch.int64)),
        "which is not a permutation of the inputs",
    ),
]
for each in (MXFP4, NVFP4, AFFINE4):
    state = f"quant_state.peftcore__{each.quant_type}"
    DAMAGES += [
        (each, lambda t: t.pop("absmax"), "lacks 'w.absmax'"),
        (each, lambda t: t.update({"quant_state.bitsandbytes__nf4": t["absmax"]}), "must be one tensor"),
        (each, lambda t, state=state: t.pop(state), "must be one tensor 'w.quant_state.bitsandbytes__nf4' or"),
        (each, lambda t, state=state: t[state].fill_(0), "cannot be read"),
    ]


@pytest.mark.parametrize(("form", "change", "message"), DAMAGES, ids=lambda value: getattr(value, "quant_type", None))
def test_damaged_parts_are_refused(form: Format, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    weight = form.quantize(torch.randn(4, 64))
    tensors = {name: t.clone() for name, t in to_tensors(weight).items()}
    change(tensors)
    with pytest.raises(peftcore.CheckpointError, match=message):
        from_tensors(weight.codes, tensors, "w")


@pytest.mark.parametrize(
    ("quant_type", "blocksize", "message"),
    [
        ("mxfp4", 128, "mxfp4 only supports blocksize=32, found blocksize=128"),
        ("nvfp4", 32, "nvfp4 only supports blocksize=16, found blocksize=32"),
        ("affine4", 96, "blocksize must be a power of two from 32 to 4096, found 96"),
    ],
)
def test_block_sizes_that_a_format_lacks_are_refused(quant_type: str, blocksize: int, message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.quantize(llama(), quant_type, blocksize=blocksize)


@FORMATS
def test_rows_that_are_not_whole_blocks_are_refused(form: Format) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))
    message = f"'1' has 8 inputs, but {form.quant_type} needs a multiple of {form.blocksize}"
    with pytest.raises(peftcore.PeftcoreError, match=message):
        quantized(form, model)
    assert type(model[0]) is nn.Linear


def test_what_a_refusal_of_rows_says_to_do_works() -> None:
    """`skip` also names what stays dense without it, and paths where a name would also select other layers."""

    def mixed() -> nn.Module:
        model = tiny.llama()
        model.model.layers[0].mlp = tiny_llama().model.layers[0].mlp
        return model

    for make, last in ((tiny.llama, "down_proj"), (mixed, "model.layers.1.mlp.down_proj")):
        with pytest.raises(peftcore.PeftcoreError, match=r"To quantize Llama\w+, leave \d of 14 ") as refused:
            peftcore.quantize(make(), "mxfp4")
        skip = ast.literal_eval(re.search(r"skip=(\[.*?\])", str(refused.value))[1])
        assert skip == ["lm_head", last]
        model = peftcore.quantize(make(), "mxfp4", skip=skip)
        dense = {path for path, each in model.named_modules() if is_dense(each)}
        assert dense == {"lm_head", *(path for path, _ in model.named_modules() if path.endswith(last))}

    with pytest.raises(peftcore.PeftcoreError, match="To quantize LlamaForCausalLM, choose blocksize=32, or "):
        peftcore.quantize(tiny_llama(), "affine4")
    peftcore.quantize(tiny_llama(), "affine4", blocksize=32)


def test_rows_of_a_checkpoint_that_are_not_whole_blocks_are_refused(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(peftcore.PeftcoreError, match="down_proj' has 48 inputs, but mxfp4 needs"):
        peftcore.quantization.load(tmp_path, "mxfp4")
    model = peftcore.quantization.load(tmp_path, "mxfp4", skip=["lm_head", "down_proj"])
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, tiny.llama().model.layers[0].mlp.down_proj.weight)


def is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear)


def test_a_checkpoint_weight_becomes_a_layer() -> None:
    """Codes, scales and zero points of a checkpoint are a layer whose products are those of their values."""
    codes, zeros = torch.randint(0, 16, (24, 64)), torch.randint(0, 16, (24, 2))
    scales = torch.rand(24, 2).half()
    dense = scales.float().repeat_interleave(32, 1) * (codes - zeros.repeat_interleave(32, 1))
    layer = convert(nn.Linear(64, 24), ops.affine4_weight(codes, scales, zeros, dtype=torch.float32), None)
    assert torch.equal(layer.dequantized(), dense)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias))


@FORMATS
def test_the_estimate_knows_the_format(form: Format) -> None:
    packed = [layer for _, layer in quantized_layers(quantized(form, llama()))]
    options = {"quant_type": form.quant_type, **form.options, "batch_size": 2, "length": 8}
    found = peftcore.estimate(llama(), "qlora", **options).summary
    assert found.packed_parameters == sum(layer.in_features * layer.out_features for layer in packed)
    assert found.packed_bytes == sum(t.nbytes for each in packed for t in (each.weight, *each.buffers()))
