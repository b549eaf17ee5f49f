"""Task types, told by running PEFT on the file."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support import against_peft, tiny
from torch import Tensor, nn

import peftcore
from peftcore.model.inputs import example_inputs
from peftcore.testing import disturb

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96}
WHISPER = {
    **{"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8},
    **{"max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "decoder_start_token_id": 1},
    **{"bos_token_id": 1, "eos_token_id": 2, "begin_suppress_tokens": None},
}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def llava() -> nn.Module:
    text = transformers.LlamaConfig(**SMALL, pad_token_id=0)
    vision = transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    return transformers.LlavaForConditionalGeneration(config)


MAKES = {
    "llama": tiny.llama,
    "bare llama": lambda: tiny.llama().model,
    "bare bert": lambda: tiny.bert_classifier().bert,
    "masked bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "t5": tiny.t5,
    "bare t5": lambda: transformers.T5Model(tiny.t5().config),
    "llava": llava,
    "whisper": lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MAKES[name]().eval()


def output(model: nn.Module, base: nn.Module) -> Tensor:
    with torch.no_grad():
        return against_peft.quiet(model, **example_inputs(base))[0]


PROMPT, PREFIX = ("prompt-tuning", {"num_virtual_tokens": 3}), ("prefix-tuning", {"num_virtual_tokens": 3})
LORA = ("lora", {"r": 2})


@pytest.mark.parametrize(
    ("name", "method", "task"),
    [
        ("llama", LORA, "CAUSAL_LM"),
        ("bare llama", LORA, None),
        ("bare llama", PROMPT, "FEATURE_EXTRACTION"),
        ("bare bert", PREFIX, "FEATURE_EXTRACTION"),
        ("masked bert", PROMPT, "FEATURE_EXTRACTION"),
        ("t5", LORA, "SEQ_2_SEQ_LM"),
        ("bare t5", PREFIX, "FEATURE_EXTRACTION"),
        ("llava", LORA, None),
        ("llava", PROMPT, "CAUSAL_LM"),
        ("llava", PREFIX, "CAUSAL_LM"),
        ("whisper", LORA, None),
    ],
)
def test_peft_computes_the_same(
    name: str, method: tuple[str, dict[str, Any]], task: str | None, tmp_path: Path
) -> None:
    model = peftcore.apply(made(name), method[0], **method[1])
    disturb(model, "default", seed=1)
    wanted = output(model, model)
    assert (wanted - output(made(name), model)).abs().max() > 1e-4
    peftcore.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task
    found = output(against_peft.quiet(peft.PeftModel.from_pretrained, made(name), tmp_path).eval(), model)
    torch.testing.assert_close(found[:, -wanted.shape[1] :], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "method"), [("bare t5", PROMPT), ("whisper", PREFIX)])
def test_prompts_of_which_peft_makes_the_base_are_reported(name: str, method, tmp_path: Path) -> None:
    model = peftcore.apply(made(name), method[0], **method[1])
    disturb(model, "default", seed=1)
    with pytest.warns(UserWarning, match="Hugging Face PEFT ignores the prompts in this file"):
        peftcore.save(model, tmp_path)
    theirs = against_peft.quiet(peft.PeftModel.from_pretrained, made(name), tmp_path).eval()
    assert torch.equal(output(theirs, model), output(made(name), model))
