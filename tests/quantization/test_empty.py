"""Models on the meta device, as a checkpoint stores them."""

import torch
from support import tiny
from transformers import AutoConfig, AutoModelForCausalLM

from peftcore import quantization


def test_what_can_be_stored_in_4_bits() -> None:
    model = tiny.llama()
    names = quantization.quantizable(model)
    quantization.quantize(model, skip=())
    assert sorted(names) == sorted(path for path, _ in quantization.quantized_layers(model))


def test_a_dense_checkpoint_is_built_as_it_is(tmp_path) -> None:
    tiny.llama().config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert not quantization.is_packed(config)
    model = quantization.build_empty(config, AutoModelForCausalLM.from_config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert next(quantization.quantized_layers(model), None) is None
    assert torch.get_default_device().type == "cpu"
