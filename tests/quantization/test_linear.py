"""The quantized layer: bitsandbytes' bits and keys both ways, and what is done with modules."""

import copy
import io
import json
import pickle

import pytest
import torch
from support.quantized import bnb, of_bnb
from torch import nn

import peftcore
from peftcore.quantization import QuantizedLinear
from peftcore.quantization.bitsandbytes_format import STATE_KEY

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense(n=48, k=128, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias).to(dtype)


def quantized(layer=None, **keywords):
    return peftcore.quantize(nn.Sequential(layer or dense()), **keywords)[0]


def same_states(found, wanted):
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        if STATE_KEY in key:
            ours, theirs = (json.loads(bytes(state[key].tolist())) for state in (found, wanted))
            assert ours.pop("nested_offset", 0.0) == pytest.approx(theirs.pop("nested_offset", 0.0), rel=1e-6)
            assert ours == theirs
        else:
            assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_state_is_that_of_bitsandbytes(dtype, quant_type, double_quant):
    ours = quantized(dense(dtype=dtype), quant_type=quant_type, double_quant=double_quant)
    theirs = of_bnb(dense(dtype=dtype), quant_type=quant_type, compress_statistics=double_quant)
    wanted, found = theirs.state_dict(), ours.state_dict()
    if double_quant:  # its 8-bit codes of scales come from a coarse table on CPU, ours are the nearest
        for part in ("absmax", "nested_absmax"):
            assert (found[f"weight.{part}"].float() - wanted[f"weight.{part}"].float()).abs().max() <= 1
            found[f"weight.{part}"] = wanted[f"weight.{part}"]
    same_states(found, wanted)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_state_of_bitsandbytes_loads_and_gives_its_output(dtype, double_quant):
    theirs = of_bnb(dense(dtype=dtype), compress_statistics=double_quant)
    ours = QuantizedLinear(128, 48, dtype=dtype)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(5, 128).to(dtype)
    # Equal weights: the two products are the same call, but for where the bias is added.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)
    assert torch.equal(ours.dequantized(), bnb.functional.dequantize_4bit(theirs.weight, theirs.weight.quant_state))
    same_states(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("double_quant", [False, True])
def test_our_state_loads_in_bitsandbytes(double_quant):
    ours = quantized(double_quant=double_quant)
    state = {
        key.removeprefix("weight."): value for key, value in ours.state_dict().items() if key.startswith("weight.")
    }
    theirs = bnb.nn.Params4bit.from_prequantized(ours.weight.data, state, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(theirs, theirs.quant_state), ours.dequantized())


def test_bytes_that_are_viewed_as_another_dtype_load():
    theirs = of_bnb(dense(dtype=torch.bfloat16), quant_storage=torch.bfloat16)
    state = theirs.state_dict()
    assert state["weight"].dtype == torch.bfloat16
    ours = QuantizedLinear(128, 48)
    ours.load_state_dict(state)
    assert torch.equal(ours.weight, quantized(dense(dtype=torch.bfloat16)).weight)


def test_a_dense_state_is_quantized_as_it_loads():
    ours = QuantizedLinear(128, 48)
    ours.load_state_dict(dense().state_dict())
    same_states(ours.state_dict(), quantized().state_dict())


def test_it_computes_with_the_weight_it_stands_for():
    layer = quantized()
    assert isinstance(layer, nn.Linear) and layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
    x = torch.randn(3, 5, 128)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantized(), layer.bias))
    error = (layer.dequantized() - dense().weight).norm() / dense().weight.norm()
    assert 0.05 < error < 0.12
    assert "nf4, blocksize=64, double_quant" in repr(layer)


def test_compute_dtype():
    layer = quantized(compute_dtype=torch.bfloat16)
    x = torch.randn(3, 128)
    wanted = nn.functional.linear(x.bfloat16(), layer.dequantized(torch.bfloat16), layer.bias.bfloat16())
    found = layer(x)
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())  # rounded by the product
    torch.testing.assert_close(found, wanted.float(), rtol=2**-7, atol=2**-7)


def copies():
    def saved(layer):
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer)), "torch.save": saved}


@pytest.mark.parametrize("how", list(copies()))
def test_copies(how):
    layer = quantized()
    twin = copies()[how](layer)
    same_states(twin.state_dict(), layer.state_dict())
    assert twin.weight is not layer.weight and type(twin) is QuantizedLinear
    x = torch.randn(2, 128)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to", "type"])
def test_casts_leave_the_quantized_weight_alone(cast):
    layer, wanted = quantized(), quantized().state_dict()
    weight = layer.weight
    casts = {"to": lambda: layer.to(torch.bfloat16), "type": lambda: layer.type(torch.float16)}
    casts.get(cast, getattr(layer, cast))()
    assert layer.bias.dtype != torch.float32 and layer.weight is weight
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    layer.float()
    wanted["bias"] = layer.state_dict()["bias"]
    same_states(layer.state_dict(), wanted)


def test_moving_and_the_meta_device():
    layer = quantized()
    there = copy.deepcopy(layer).to("meta")
    assert there.weight.is_meta and there.absmax.is_meta and there.nested_offset.is_meta
    assert there(torch.empty(3, 128, device="meta")).shape == (3, 48)
    assert list(there.state_dict()) == ["weight", "bias"]
    there.to_empty(device="cpu")
    there.load_state_dict(layer.state_dict())
    same_states(there.state_dict(), layer.state_dict())
    with torch.device("meta"):
        empty = QuantizedLinear(128, 48)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert empty.weight.device.type == "cpu"
    same_states(empty.state_dict(), layer.state_dict())


def broken(change):
    state = quantized().state_dict()
    key = f"weight.{STATE_KEY}nf4"
    facts = json.loads(bytes(state[key].tolist()))
    change(state, facts)
    if key in state and facts is not None:
        state[key] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, f: s.pop(f"weight.{STATE_KEY}nf4"), "must be one tensor 'weight.quant_state.bitsandbytes__nf4'"),
        (lambda s, f: s.pop("weight.absmax"), "lacks 'weight.absmax'"),
        (lambda s, f: s.pop("weight.nested_quant_map"), "lacks 'weight.nested_quant_map'"),
        (lambda s, f: f.update(shape=[48, 64]), r"has 'absmax' torch.uint8 \[96\], expected torch.uint8 \[48\]"),
        (lambda s, f: f.update(shape=[128, 48]), r"has shape \[128, 48\], but the layer needs \[48, 128\]"),
        (lambda s, f: f.update(blocksize=48), "blocksize must be a power of two from 32 to 4096, found 48"),
        (lambda s, f: f.update(quant_type="nf5"), "has quant_type='nf5' in 'quant_state"),
        (lambda s, f: f.update(dtype="float8"), "has dtype='float8', but it must be one of float32, float16, bfloat16"),
        (lambda s, f: f.update(dtype=["float32"]), "has dtype="),
        (lambda s, f: f.update(nested_offset=float("nan")), "it contains NaN, which is not a JSON number"),
        (lambda s, f: f.update(nested_offset=10**400), "has nested_offset=1000"),
        (lambda s, f: f.update(nested_offset=1e39), r"has nested_offset=1e\+39, which is not a finite float32"),
        (lambda s, f: f.update(nested_offset=None), "has nested_offset=None"),
        (lambda s, f: f.update(nested_blocksize=0), "nested_blocksize must be a power of two from 32 to 4096, found 0"),
        (lambda s, f: f.update(nested_blocksize=-256), "nested_blocksize must be a power of two"),
        (lambda s, f: f.update(nested_blocksize="256"), "nested_blocksize must be a power of two"),
        (lambda s, f: f.update(blocksize="64"), "blocksize must be a power of two from 32 to 4096, found '64'"),
        (lambda s, f: f.update(blocksize=64.5), r"blocksize must be a power of two from 32 to 4096, found 64\.5"),
        (lambda s, f: f.update(blocksize=None), "blocksize must be a power of two"),
        (lambda s, f: f.update(quant_type="fp4"), "has quant_type='fp4' in 'quant_state.bitsandbytes__nf4'"),
        (lambda s, f: f.update(quant_type=["nf4"]), r"has quant_type=\['nf4'\] in 'quant_state"),
        (lambda s, f: f.update(shape=["48", 128]), r"has shape=\['48', 128\], which is not the shape"),
        (lambda s, f: f.update(shape=[-48, -128]), "which is not the shape"),
        (lambda s, f: f.update(shape=6144), "has shape=6144"),
        (lambda s, f: s.update({"weight.absmax": s["weight.absmax"].view(2, 48)}), r"torch.uint8 \[2, 48\], expected"),
        (
            lambda s, f: s.update({"weight.quant_map": s["weight.quant_map"].view(4, 4)}),
            r"\[4, "
            r"4\], expected .* \[16\]",
        ),
        (lambda s, f: s.update({"weight": s["weight"].view(1536, 2)}), r"has bytes torch.uint8 \[1536, 2\], expected"),
        (lambda s, f: s.update({"weight": s["weight"].view(-1)}), r"has bytes torch.uint8 \[3072\], expected"),
        (
            lambda s, f: s.update({"weight": s["weight"].view(-1).view(torch.int32).view(-1, 1)}),
            "has bytes torch.int32",
        ),
        (lambda s, f: s.update({"weight": s["weight"][:-1]}), "has 3071 bytes, but shape .* needs 3072"),
        (lambda s, f: s["weight.nested_absmax"].fill_(torch.inf), "NaN or Inf in 'nested_absmax'"),
        (
            lambda s, f: s.update({"weight": torch.ones(48, 127)}),
            r"has bytes torch.float32 \[48, 127\], expected torch.uint8",
        ),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    with pytest.raises(RuntimeError, match=message):
        QuantizedLinear(128, 48).load_state_dict(broken(change))


def test_random_bytes_in_place_of_the_facts():
    state = quantized().state_dict()
    state[f"weight.{STATE_KEY}nf4"] = torch.randint(0, 256, (60,), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="cannot be read"):
        QuantizedLinear(128, 48).load_state_dict(state)


def test_missing_and_unknown_keys_are_named():
    state = quantized().state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        QuantizedLinear(128, 48).load_state_dict({key: state[key] for key in state if not key.startswith("weight")})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight.other"'):
        QuantizedLinear(128, 48).load_state_dict({**state, "weight.other": torch.ones(1)})


def test_loading_keeps_the_parameter():
    layer = QuantizedLinear(128, 48)
    weight = layer.weight
    layer.load_state_dict(quantized().state_dict())
    assert layer.weight is weight and torch.equal(weight, quantized().weight)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_inputs_that_a_model_casts_to_the_packed_weights_dtype(compute_dtype, adapted):
    model = nn.Sequential(quantized(compute_dtype=compute_dtype))
    if adapted:
        peftcore.apply(model, "lora", target_modules=["0"])
    with pytest.raises(peftcore.PeftcoreError, match=r"layer \[48, 128\] got an input in torch\.uint8.*`skip`"):
        model(torch.ones(2, 128).to(model[0].weight.dtype))
