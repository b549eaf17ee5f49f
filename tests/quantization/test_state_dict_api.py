"""`get_model_state_dict` and `set_model_state_dict` of torch.distributed.checkpoint on a quantized model."""

import pytest
import torch
from support import tiny
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import peftcore


def quantized(seed: int = 0, adapter: bool = False) -> torch.nn.Module:
    model = peftcore.quantize(tiny.llama(seed=seed))
    return peftcore.apply(model, "lora", init_lora_weights=False) if adapter else model


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_there_and_back(adapter: bool, full: bool) -> None:
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    model, other = quantized(0, adapter), quantized(1, adapter)
    state = get_model_state_dict(model, options=options)
    assert state.keys() == model.state_dict().keys()
    assert "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4" in state
    wanted = tiny.logits(model)
    assert not torch.equal(tiny.logits(other), wanted)
    done = set_model_state_dict(other, dict(state), options=options)
    assert not done.missing_keys and not done.unexpected_keys
    assert torch.equal(tiny.logits(other), wanted)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_only_what_trains() -> None:
    model = quantized(adapter=True)
    state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    assert any("lora_A" in key for key in state)
    assert "model.layers.0.mlp.up_proj.weight" not in state


def test_a_strange_key_is_still_named() -> None:
    model = quantized()
    state = {**model.state_dict(), "model.layers.0.mlp.up_proj.absmax": torch.ones(3)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*mlp\.up_proj\.absmax"):
        model.load_state_dict(state)
