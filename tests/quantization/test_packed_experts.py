"""Experts in 4 bits: what is reached, what they compute, and bitsandbytes' bits and keys."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from bitsandbytes.nn import parametrize
from support.mixtures import FAMILIES, INPUTS, mixture
from torch import nn

import peftcore
from peftcore.model import detect
from peftcore.model.base_modules import original_class
from peftcore.model.targets.coverage import coverage
from peftcore.quantization import PackedParameters, QuantizedLinear, quantized_experts, quantized_layers
from peftcore.quantization.formats import from_tensors
from peftcore.testing import disturb

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STATE = "quant_state.bitsandbytes__"


def reached(model):
    """What share of the weight in layers is in 4 bits, routers left out, which nothing quantizes."""
    found = coverage(model, detect(model), [path for path, _ in [*quantized_layers(model), *quantized_experts(model)]])
    return found.share


def experts(model):
    return next(module for _, module in quantized_experts(model))


def adapted(model):
    torch.manual_seed(1)
    peftcore.apply(model, "lora", r=2)
    assert any(name.endswith("proj.lora_A") and "experts" in name for name, _ in model.named_parameters())
    disturb(model, "default", 1, std=0.1)
    y = model(**INPUTS).logits
    y.square().mean().backward()
    return y.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", FAMILIES)
def test_reached_and_equal_to_dense_values(kind):
    model = mixture(kind)
    keys = list(model.state_dict())
    assert peftcore.quantize(model) is model and reached(model) >= 0.95
    routers = [path for path, module in model.named_modules() if path.endswith((".router", ".gate"))]
    assert routers and not any(isinstance(model.get_submodule(path), PackedParameters) for path in routers)
    dense = peftcore.dequantize(copy.deepcopy(model))
    assert list(dense.state_dict()) == keys and not any(isinstance(m, PackedParameters) for m in dense.modules())
    again = mixture(kind)
    again.load_state_dict(dense.state_dict())
    wanted = again(**INPUTS).logits
    assert torch.equal(dense(**INPUTS).logits, wanted)
    torch.testing.assert_close(model(**INPUTS).logits, wanted, rtol=1e-5, atol=1e-5)
    (y, gradients), (z, others) = adapted(model), adapted(dense)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    assert len(gradients) > 1 and all(g.abs().max() > 0 for g in others)
    for found, wanted in zip(gradients, others, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("kind", "quant_type", "double_quant"),
    [
        *((kind, "nf4", True) for kind in FAMILIES),
        *((kind, *how) for kind in ("gpt_oss", "llama4_text") for how in (("nf4", False), ("fp4", False))),
    ],
)
def test_bits_and_keys_of_bitsandbytes(kind, quant_type, double_quant):
    # Of fewer than 256 blocks it misreads its own nested scales.
    wide = {"moe_intermediate_size": 64} if "moe_intermediate_size" in FAMILIES[kind] else {}
    dense = next(m for m in mixture(kind, **wide).modules() if hasattr(m, "gate_up_proj"))
    theirs, ours = copy.deepcopy(dense), nn.ModuleList([dense])
    peftcore.quantize(ours, quant_type, double_quant=double_quant)
    for name in ("gate_up_proj", "down_proj"):
        parametrize.replace_parameter_4bit(theirs, name, double_quant, quant_type, blocksize=64)
    found, wanted = ours[0].state_dict(), theirs.state_dict()
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        if key.endswith(STATE + quant_type):
            facts = [json.loads(bytes(state[key].tolist())) for state in (found, wanted)]
            assert facts[0].pop("nested_offset", 0) == pytest.approx(facts[1].pop("nested_offset", 0))
            assert facts[0] == facts[1]
        elif not (double_quant and key.endswith("absmax")):  # its 8-bit codes of scales on the CPU are not the nearest
            assert torch.equal(found[key], value), key
    for name in ("gate_up_proj", "down_proj"):
        near = (ours[0].dequantized_parameter(name) - getattr(theirs, name)).abs().max()
        assert near <= (1e-2 if double_quant else 0) * getattr(theirs, name).abs().max()

    ours[0].load_state_dict(wanted)  # theirs, read here
    assert all(torch.equal(value, wanted[key]) for key, value in ours[0].state_dict().items() if STATE not in key)
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(ours[0].dequantized_parameter(name), getattr(theirs, name))
    other = copy.deepcopy(dense).__class__.__new__(type(theirs).__mro__[1])  # ours, read there
    nn.Module.__init__(other)
    for name in ("gate_up_proj", "down_proj"):
        other.register_parameter(name, nn.Parameter(found[name], requires_grad=False))
        parts = {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")}
        parametrize.replace_parameter_4bit_prequantized(other, name, dict(parts), torch.device("cpu"))
        packed = from_tensors(found[name], parts, name)
        assert torch.equal(getattr(other, name), peftcore.ops.dequantize_4bit(packed))


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
def test_pickled_copied_cast_and_loaded(kind):
    model = peftcore.quantize(mixture(kind))
    wanted, state = model(**INPUTS).logits, model.state_dict()
    kinds = type(experts(model)).__mro__[2]
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(**INPUTS).logits, wanted) and isinstance(experts(other), kinds)
        assert experts(other).gate_up_proj.data_ptr() != experts(model).gate_up_proj.data_ptr()
    fresh = peftcore.quantize(mixture(kind, initializer_range=0.5))
    with torch.no_grad():
        for _, module in quantized_experts(fresh):
            module.down_proj.random_(256)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(**INPUTS).logits, wanted)
    fresh.bfloat16()
    half = fresh(**INPUTS).logits
    assert half.dtype is torch.bfloat16 and experts(fresh).down_proj_absmax.dtype is torch.uint8
    torch.testing.assert_close(half.float(), wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())
    fresh.float().load_state_dict(mixture(kind).state_dict())  # dense values are quantized as they come
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
    broken = {**state, **{key: value[:-1] for key, value in state.items() if key.endswith("down_proj.absmax")}}
    with pytest.raises(RuntimeError, match=r"down_proj' has 'absmax' torch.uint8 \[\d+\], expected"):
        fresh.load_state_dict(broken)


def test_compute_dtype_and_one_process_with_several_calls():
    model = peftcore.quantize(mixture("gpt_oss"), compute_dtype=torch.bfloat16)
    module = experts(model)
    hidden, index, weights = torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    found = module(hidden, index, weights)
    assert found.dtype is torch.float32
    other = peftcore.dequantize(copy.deepcopy(model)).bfloat16()
    wanted = next(m for m in other.modules() if hasattr(m, "gate_up_proj"))(hidden.bfloat16(), index, weights)
    torch.testing.assert_close(found, wanted.float(), rtol=0.05, atol=0.05 * wanted.abs().max().item())


def test_blocks_that_would_straddle_experts():
    with pytest.warns(
        UserWarning, match=r"2 weights of experts \('.*down_proj'\) are quantized in blocks of 32, because .* of 64"
    ):
        model = peftcore.quantize(mixture("qwen3_moe", moe_intermediate_size=25, hidden_size=32))
    assert {m.packings[n].blocksize for _, m in quantized_experts(model) for n in m.packings} == {64, 32}
    with pytest.warns(UserWarning) as told:
        model = peftcore.quantize(mixture("qwen3_moe", moe_intermediate_size=4, hidden_size=36))
    none, small = sorted(str(each.message) for each in told)
    assert "down_proj') are left dense, because the size of an expert is not a multiple of 32 values" in none
    assert "gate_up_proj') are quantized in blocks of 32" in small
    assert all(set(module.packings) == {"gate_up_proj"} for _, module in quantized_experts(model))
    model(**INPUTS)


def test_what_is_left_dense():
    model = peftcore.quantize(mixture("mixtral"), skip=["layers.0.mlp.experts", "lm_head", "experts.down_proj"])
    (path, module), *others = quantized_experts(model)
    assert path == "model.layers.1.mlp.experts" and not others and set(module.packings) == {"gate_up_proj"}
    model(**INPUTS)
    peftcore.quantize(model)  # what is left; what is there keeps its bits
    assert len(list(quantized_experts(model))) == 2 and set(module.packings) == {"gate_up_proj", "down_proj"}
    with pytest.raises(peftcore.PeftcoreError, match=r"'gate_up_porj' matches no module.*gate_up_proj"):
        peftcore.quantize(mixture("mixtral"), skip=["gate_up_porj"])
    bad = mixture("mixtral")
    bad.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = torch.inf
    with pytest.raises(
        peftcore.PeftcoreError,
        match=r"layers.1.mlp.experts.down_proj' contains "
        r"inf at index \[2, 3, 4\]",
    ):
        peftcore.quantize(bad)
    assert not any(isinstance(module, PackedParameters) for module in bad.modules())


class Block(nn.Module):
    """A router and experts as old models have them."""

    def __init__(self):
        super().__init__()
        self.router, self.experts, self.after = nn.Linear(64, 3), Experts(), nn.Linear(64, 64)

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        return self.after((self.experts(x) * shares.T[:, :, None]).sum(0))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_expert, self.w = 3, nn.Parameter(torch.randn(3, 64, 64))
        self.past = nn.Parameter(torch.randn(3, 64, 64))  # the forward names another

    def forward(self, x):
        self.seen = len(x)
        return x @ self.w


def test_experts_and_routers_of_other_models():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(5, 64)
    with pytest.warns(UserWarning, match="experts' stacked weights"):
        peftcore.quantize(model)
    assert not list(quantized_experts(model))  # half of them are read somewhere else
    model = Block()
    del model.experts.past
    peftcore.quantize(model)
    assert original_class(model.router) is nn.Linear and set(experts(model).packings) == {"w"}
    assert torch.equal(model.experts(x), x @ model.experts.dequantized_parameter("w")) and model.experts.seen == 5
    assert type(peftcore.quantize(Block(), skip=[]).router) is QuantizedLinear


def test_no_warning_about_reached_experts():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peftcore.quantize(mixture("mixtral"))
