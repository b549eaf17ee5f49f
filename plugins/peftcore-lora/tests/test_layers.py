"""LoRA on subclasses of the layers it knows: exact, merged and in PEFT's eyes, or refused."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Llama4TextConfig, PhimoeConfig

import peftcore
from peftcore.engine import adapter_modules
from peftcore.plugin import disturb

IDS = torch.tensor([[1, 2, 3, 5], [4, 19, 0, 5]])
ROWS, SIGNAL, IMAGE = torch.randn(6, 8), torch.randn(2, 8, 9), torch.randn(2, 8, 9, 9)


class Box(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Any:
        return self.layer(*inputs)


def model_of(family: str, name: str, *arguments: Any, **options: Any) -> nn.Module:
    """A layer of a transformers class, with random weights, in a model."""
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    torch.manual_seed(0)
    model = Box(kind(*arguments, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


ROUTER = {"hidden_size": 8, "num_local_experts": 6, "num_experts_per_tok": 2}
NO_NOISE = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
# What PEFT adds to the output is what W + B A gives.
LIKE_PEFT: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "Gemma 3": (lambda: model_of("gemma3", "Gemma3TextScaledWordEmbedding", 20, 8, 0, embed_scale=3.0), IDS),
    "Gemma 3n": (lambda: model_of("gemma3n", "Gemma3nTextScaledWordEmbedding", 20, 8, 0, embed_scale=3.0), IDS),
    "BART": (lambda: model_of("bart", "BartScaledWordEmbedding", 20, 8, 0, embed_scale=3.0), IDS),
    "Falcon": (lambda: model_of("falcon", "FalconLinear", 8, 6), ROWS),
    "Gemma 4's audio": (lambda: model_of("gemma4", "Gemma4AudioCausalConv1d", 8, 6, 3), SIGNAL),
    "Parakeet's head": (lambda: model_of("parakeet", "ParakeetEncoderCTCHead", 8, 6, 1), SIGNAL.transpose(1, 2)),
    "Perceiver": (lambda: model_of("perceiver", "Conv2dSamePadding", 8, 6, 3), IMAGE),
}
# PEFT cannot run these; W + B A stands.
ON_WEIGHT: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "Llama 4's router": (lambda: model_of("llama4", "Llama4Router", Llama4TextConfig(**ROUTER)), ROWS),
    "PhiMoE's router": (lambda: model_of("phimoe", "PhimoeTopKRouter", PhimoeConfig(**ROUTER, **NO_NOISE)), ROWS),
    "in groups": (lambda: model_of("deepseek_v4", "DeepseekV4GroupedLinear", 8, 12, 2), torch.randn(3, 2, 8)),
    "Idefics": (lambda: model_of("idefics", "IdeficsDecoupledLinear", 8, 6, 3, True, False), ROWS),
    "Voxtral": (lambda: model_of("voxtral_realtime", "VoxtralRealtimeCausalConv1d", 8, 6, 3, "key"), SIGNAL),
    "Moonshine": (lambda: model_of("moonshine_streaming", "MoonshineStreamingCausalConv1d", 8, 6, 3), SIGNAL),
    "Ovis": (lambda: model_of("ovis2", "Ovis2VisualEmbeddingTable", 20, 8), torch.randn(2, 4, 20).softmax(-1)),
}


def tensors(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple) else (output,)
    return [part.detach() for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def close(actual: Any, expected: Any) -> None:
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def adapted(model: nn.Module, **fields: Any) -> nn.Module:
    peftcore.apply(model, "lora", target_modules=["layer"], r=2, lora_alpha=6, **fields)
    disturb(model, "default", seed=1)
    return model


@pytest.mark.parametrize("case", [*LIKE_PEFT.values(), *ON_WEIGHT.values()], ids=[*LIKE_PEFT, *ON_WEIGHT])
def test_merged_is_what_acts(case: tuple[Callable[[], nn.Module], Any]) -> None:
    make, inputs = case
    base, model = make(), adapted(make())
    acting = model(inputs)
    changed = zip(tensors(acting), tensors(base(inputs)), strict=True)
    assert max((a - b).abs().max() for a, b in changed) > 0.1
    close(peftcore.merge(copy.deepcopy(model), undo=True)(inputs), acting)
    grown = base.layer.weight.detach() + model.layer.peftcore["default"].delta()
    close(torch.func.functional_call(base, {"layer.weight": grown}, (inputs,)), acting)
    parts = acting if isinstance(acting, tuple) else (acting,)
    sum(part.square().mean() for part in parts if part is not None and part.requires_grad).backward()
    for _, adapter in adapter_modules(model, "default"):
        assert all(p.grad is not None for p in adapter.parameters())
    peftcore.remove(model)
    close(model(inputs), base(inputs))


@pytest.mark.parametrize("name", ["Voxtral", "Moonshine"])
def test_a_bias_is_added_to_the_bias_of_a_layer_that_reads_a_changed_weight(name: str) -> None:
    make, inputs = ON_WEIGHT[name]
    base, model = make(), adapted(make(), lora_bias=True)
    adapter, layer = model.layer.peftcore["default"], base.layer
    weight, bias = layer.weight.detach() + adapter.delta(), layer.bias.detach() + 3 * adapter.lora_bias.detach()
    close(torch.func.functional_call(base, {"layer.weight": weight, "layer.bias": bias}, (inputs,)), model(inputs))
    close(peftcore.merge(copy.deepcopy(model), undo=True)(inputs), model(inputs))


@pytest.mark.parametrize("case", LIKE_PEFT.values(), ids=LIKE_PEFT)
def test_peft_computes_the_same(case: tuple[Callable[[], nn.Module], Any], tmp_path: Path) -> None:
    make, inputs = case
    model = adapted(make())
    peftcore.save(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
        close(peft_model(inputs), model(inputs))
        peft_model.save_pretrained(tmp_path / "theirs")
    close(peftcore.load(make(), tmp_path / "theirs")(inputs), model(inputs))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BART's places": (lambda: model_of("bart", "BartLearnedPositionalEmbedding", 20, 8), "more than look up its input"),
    "OPT's places": (lambda: model_of("opt", "OPTLearnedPositionalEmbedding", 20, 8), "more than look up its input"),
    "Whisper's places": (lambda: model_of("whisper", "WhisperPositionalEmbedding", 20, 8), "more than look up its"),
    "a second table": (
        lambda: model_of("idefics", "IdeficsDecoupledEmbedding", 20, 4, 8, False, padding_idx=0),
        "more than look up its input",
    ),
    "rows of bounded norm": (lambda: Box(nn.Embedding(20, 8, max_norm=1.0)), "more than look up its input"),
    "standardized": (
        lambda: model_of("bit", "WeightStandardizedConv2d", 8, 6, 3),
        "more than a convolution with its weight",
    ),
    "complex": (lambda: Box(nn.Linear(8, 6, dtype=torch.complex64)), "its weights are complex"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(case: tuple[Callable[[], nn.Module], str]) -> None:
    make, message = case
    model = make()
    with pytest.raises(peftcore.PeftcoreError, match=rf"'layer'.*{message}"):
        peftcore.apply(model, "lora", target_modules=["layer"])
    assert type(model.layer) is type(make().layer) and peftcore.engine.state_of(model) is None


def test_what_acts_as_in_peft_and_does_not_merge(tmp_path: Path) -> None:
    """A head that scales its logits, and tokens that an embedding replaces: PEFT adds B A behind that."""
    cases = [(lambda: model_of("t5gemma2", "T5Gemma2TextScaledWordEmbedding", 20, 8, 0, 3.0, 5), IDS)]
    if hasattr(transformers, "DoryConfig"):  # not in transformers 5.20
        sizes = transformers.DoryConfig(hidden_size=8, vocab_size=6, initializer_range=0.02)
        cases.append((lambda: model_of("dory", "DoryLMHead", sizes), ROWS))
    for make, inputs in cases:
        model = adapted(make())
        peftcore.save(model, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            close(peft.PeftModel.from_pretrained(make(), tmp_path).eval()(inputs), model(inputs))
        with pytest.raises(peftcore.PeftcoreError, match="would change the model's output"):
            peftcore.merge(model, undo=True)


def test_gemma_in_bf16_is_scaled_as_its_embedding() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=96, num_key_value_heads=2, **sizes)).eval()
    peftcore.apply(model, "lora", target_modules=["embed_tokens", "q_proj"])
    disturb(model, "default", seed=1)
    tokens = torch.tensor([[5, 17, 3, 60]])
    with torch.no_grad():
        acting = model(input_ids=tokens).logits
        low = copy.deepcopy(model).to(torch.bfloat16)(input_ids=tokens).logits
        with pytest.warns(UserWarning, match="untied"):
            merged = peftcore.merge(model, untie=True, undo=True)(input_ids=tokens).logits
    torch.testing.assert_close(merged, acting, rtol=0, atol=1e-5)
    assert (low - acting).abs().max() < 0.05 * acting.abs().max()


def test_dropout_that_does_not_act_is_said() -> None:
    model = model_of("llama4", "Llama4Router", Llama4TextConfig(**ROUTER))
    with pytest.warns(UserWarning, match=r"lora_dropout=0.5 has no effect at 1 of 1 modules.*such as 'layer'"):
        peftcore.apply(model, "lora", target_modules=["layer"], lora_dropout=0.5)
    disturb(model, "default", seed=1)
    assert torch.equal(model.train()(ROWS)[1], model.eval()(ROWS)[1])


def test_saving_says_what_peft_cannot_run(tmp_path: Path) -> None:
    make, inputs = ON_WEIGHT["Llama 4's router"]
    model = adapted(make())
    with pytest.warns(UserWarning, match=r"PEFT cannot read this file: in a Box, .*exclude_modules=\['layer'\]"):
        peftcore.save(model, tmp_path)
    close(peftcore.load(make(), tmp_path)(inputs), model(inputs))
