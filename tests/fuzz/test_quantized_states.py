"""600 mutated states of 4-bit weights (each tenth in `make test`): the right weight, or a message.

Right is what the format's description gives for the same tensors.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path

import torch
from fuzz import corpus
from fuzz.folders import TEXTS, VALUES
from safetensors.torch import load_file, save_file
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.quantization import QuantizedLinear
from peftcore.quantization.formats import from_tensors

COUNT = 600
CHECKPOINTS = 100  # whole ones, which take longer
STATE = "weight.quant_state.bitsandbytes__"
FACTS = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset", "nested_dtype"]


def original(rng: random.Random) -> tuple[dict[str, Tensor], dict]:
    """(state of a layer, options of an empty one that takes it)."""
    options = {
        "quant_type": rng.choice(["nf4", "fp4"]),
        "double_quant": rng.random() < 0.6,
        "blocksize": rng.choice([32, 64, 64, 128, 4096]),
    }
    n, k = rng.choice([(48, 128), (64, 64), (5, 7), (1, 33), (96, 40)])
    torch.manual_seed(rng.randrange(1 << 30))
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    layer = peftcore.quantize(nn.Sequential(nn.Linear(k, n, dtype=dtype)), **options)[0]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    return state, {"in_features": k, "out_features": n, "dtype": dtype}


def by_hand(state: dict[str, Tensor]) -> Tensor:
    """The weight `[out, in]`, from the description of the format."""
    (key,) = (key for key in state if key.startswith(STATE))
    facts = json.loads(bytes(state[key].tolist()))
    packed = state["weight"].reshape(-1).view(torch.uint8).long()
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)
    count = math.prod(facts["shape"])
    absmax = state["weight.absmax"]
    if "weight.nested_absmax" in state:
        scales = state["weight.nested_absmax"].repeat_interleave(facts.get("nested_blocksize", 256))[: len(absmax)]
        absmax = state["weight.nested_quant_map"][absmax.long()] * scales + torch.tensor(float(facts["nested_offset"]))
    scales = absmax.repeat_interleave(facts["blocksize"])[:count]
    values = state["weight.quant_map"][codes[:count]] * scales
    return values.view(facts["shape"]).to(getattr(torch, facts["dtype"]))


def mutated(rng: random.Random, state: dict[str, Tensor]) -> str:
    """Change the state; in a word, how."""
    (key,) = (key for key in state if key.startswith(STATE))
    name = rng.choice(sorted(state.keys() - {"bias"}))
    value = state[name]
    kind = rng.choice(
        ["fact", "fact", "fact", "text", "bits", "drop", "rename", "dtype", "shape", "values", "cut", "extra", "swap"]
    )
    match kind:
        case "fact":
            facts = json.loads(bytes(state[key].tolist()))
            known = [*FACTS, "quant_type", "blocksize"]
            sizes = [16, 32, 64, 128, 256, 4096, 8192, -64, 48, 0, 1 << 70, "64", 64.0, [48, 128], [128, 48], [64, 96]]
            facts[rng.choice(known)] = rng.choice([*VALUES, *sizes, "nf4", "fp4", "bfloat16", "float32", "float64"])
            state[key] = _bytes(json.dumps(facts))
        case "text":
            text = bytes(state[key].tolist()).decode()
            state[key] = _bytes(
                rng.choice([*TEXTS, text[:-1], text + " ", text.replace("6", "9"), f"[{text}]", "null", "3"])
            )
        case "bits":
            raw = value.contiguous().reshape(-1).view(torch.uint8)
            for _ in range(rng.choice([1, 1, 8])):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            state[name] = raw.view(value.dtype).view(value.shape)
        case "drop":
            del state[name]
        case "rename":
            state[
                rng.choice([name + "x", "weight.x", name.replace("nf4", "fp4"), name.replace("absmax", "quant_map")])
            ] = state.pop(name)
        case "dtype":
            state[name] = value.to(
                rng.choice([torch.int64, torch.float32, torch.float16, torch.bool, torch.int8, torch.float64])
            )
        case "shape":
            state[name] = rng.choice(
                [value.reshape(-1), value.unsqueeze(0), value.reshape(1, -1), value.reshape(-1, 1)]
            )
        case "values":
            number = rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e38])
            state[name] = value.clone()
            where = rng.randrange(value.numel())
            state[name].view(-1)[where] = number if value.is_floating_point() else rng.randrange(256)
        case "cut":
            state[name] = torch.cat([value, value])[: rng.choice([0, 1, len(value) - 1, len(value) + 1])].clone()
        case "extra":
            state[rng.choice(["weight.y", "weight.nested_absmax", STATE + "nf4", STATE + "fp4"])] = value.clone()
        case _:
            other = rng.choice(sorted(state))
            state[name], state[other] = state[other], state[name]
    return f"{kind} of {name}"


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_by_hand() -> None:
    for number in range(20):
        state, options = original(random.Random(number))
        layer = QuantizedLinear(**options)
        layer.load_state_dict(state)
        assert torch.equal(layer.dequantized(), by_hand(state))


def test_mutated_states() -> None:
    def case(number: int, rng: random.Random) -> str:
        state, options = original(rng)
        said = mutated(rng, state)
        try:
            return _outcome(state, options)
        except Exception as error:
            raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error

    corpus.report("4-bit states", COUNT, case)


def _outcome(state: dict[str, Tensor], options: dict) -> str:
    parts = {name.removeprefix("weight."): t for name, t in state.items() if name.startswith("weight.")}
    layer = QuantizedLinear(**options)
    before = layer.dequantized()
    refused = None
    if "weight" in state and parts:
        try:
            from_tensors(state["weight"], parts, "weight")
        except peftcore.CheckpointError as error:
            refused = error
    try:
        layer.load_state_dict(state)
    except RuntimeError as error:
        assert "Error(s) in loading state_dict for QuantizedLinear" in str(error)
        ours = any(word in str(error) for word in ("4-bit state", "this layer", "holds"))
        assert ours or "key(s) in state_dict" in str(error) or "size mismatch for bias" in str(error), str(error)
        if refused is not None:
            assert torch.equal(layer.dequantized(), before)
        return "refused"
    assert refused is None, f"from_tensors refuses what the layer takes: {refused}"
    found, wanted = layer.dequantized(), by_hand(state)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted), "another weight than the tensors say"
    assert layer(torch.ones(2, options["in_features"], dtype=options["dtype"])).shape == (2, options["out_features"])
    return "loaded"


def test_mutated_checkpoints(tmp_path: Path) -> None:
    """One layer's state in a transformers checkpoint, read by `peftcore.quantization.load`."""
    peftcore.quantize(tiny.llama()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    layers = sorted(name.removesuffix("weight") for name in whole if name.endswith("proj.weight"))

    def case(number: int, rng: random.Random) -> str:
        prefix = rng.choice(layers)
        state = {name.removeprefix(prefix): t.clone() for name, t in whole.items() if name.startswith(prefix)}
        said = mutated(rng, state)
        rest = {name: tensor for name, tensor in whole.items() if not name.startswith(prefix)}
        save_file({**rest, **{prefix + name: t.contiguous() for name, t in state.items()}}, file, {"format": "pt"})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = peftcore.quantization.load(tmp_path)
        except peftcore.CheckpointError:
            return "refused"
        except Exception as error:
            raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
        layer = model.get_submodule(prefix.removesuffix("."))
        assert torch.equal(layer.dequantized(), by_hand(state)), f"{said}: another weight than the tensors say"
        return "loaded"

    corpus.report("4-bit checkpoints", CHECKPOINTS, case)
