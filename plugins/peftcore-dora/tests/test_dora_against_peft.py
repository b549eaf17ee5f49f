"""Hugging Face PEFT reads what is saved here, and the other way round, with the same outputs; training goes its way."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.plugin import disturb

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to", "ignore:Model has `tie_word_embeddings=True`"
)


class Convolutions(nn.Module):
    """A stem of each number of dimensions, with strides, padding and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Conv1d(3, 6, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(3, 6, 3, padding=1)
        self.space = nn.Conv3d(3, 4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 3, 4, 4, 4]"""
        parts = self.line(x.flatten(2)), self.plane(x.flatten(3)), self.space(x)
        return torch.cat([part.flatten(1) for part in parts], 1)


LAYERS = ["q_proj", "down_proj"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tiny.llama, {"target_modules": LAYERS}),
    "rslora": (tiny.llama, {"target_modules": LAYERS, "use_rslora": True}),
    "ranks": (tiny.llama, {"target_modules": LAYERS, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "both random": (tiny.llama, {"target_modules": LAYERS, "init_lora_weights": False}),
    "embedding": (tiny.llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "Conv1D": (tiny.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "biases trained": (tiny.bert_classifier, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "convolutions": (Convolutions, {"target_modules": ["line", "plane", "space"]}),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    make, fields = CASES[request.param]
    return make, {"r": 4, "lora_alpha": 12, **fields}


def outputs(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        if isinstance(inner, Convolutions):
            return model(torch.linspace(-1, 3, 2 * 3 * 64).sin().view(2, 3, 4, 4, 4))
        return model(**tiny.inputs(inner)).logits


def quiet(call: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def of_peft(model: nn.Module, fields: dict[str, Any], seed: int = 2) -> nn.Module:
    """PEFT's DoRA with other values than at the start."""
    config = peft.LoraConfig(**fields, use_dora=True)
    model = quiet(peft.get_peft_model, model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_peft_reads_ours(case: Any, tmp_path: Path) -> None:
    make, fields = case
    model, base = make(), outputs(make())
    peftcore.apply(model, "dora", **fields)
    if fields.get("init_lora_weights", True):
        torch.testing.assert_close(outputs(model), base, rtol=0, atol=1e-6)
    disturb(model, "default", seed=1)
    assert (outputs(model) - base).abs().max() > 1e-3
    peftcore.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    peft_model = quiet(peft.PeftModel.from_pretrained, make(), tmp_path).eval()
    torch.testing.assert_close(outputs(peft_model), outputs(model), rtol=0, atol=1e-5)


def test_ours_reads_peft(case: Any, tmp_path: Path) -> None:
    make, fields = case
    peft_model = of_peft(make(), fields)
    quiet(peft_model.save_pretrained, tmp_path / "theirs")
    model = peftcore.load(make(), tmp_path / "theirs")
    assert peftcore.engine.applied(model, "default").method == "dora"
    expected = outputs(peft_model)
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-5)
    peftcore.save(model, tmp_path / "ours")
    files = [safetensors.torch.load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert {n: t.shape for n, t in files[0].items() if "base_layer.weight" not in n} == {
        n: t.shape for n, t in files[1].items()
    }
    peftcore.merge(model, untie=True, undo=True)
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-5)


def losses(model: nn.Module, steps: int = 8) -> Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    actual = []
    for step in range(steps):
        tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(step % 2))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        actual.append(loss.item())
    return torch.tensor(actual)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "embedding"])
def test_training_goes_the_way_of_peft(kind: str, tmp_path: Path) -> None:
    make, fields = CASES["Conv1D" if kind == "gpt2" else kind]
    fields = {"r": 4, "lora_alpha": 12, **fields}
    peft_model = of_peft(make(), fields)
    quiet(peft_model.save_pretrained, tmp_path)
    model = peftcore.load(make(), tmp_path, trainable=True)
    expected, actual = losses(peft_model), losses(model)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)
    moved = dict(adapter_parameters(model, "default"))
    start = dict(adapter_parameters(peftcore.load(make(), tmp_path, trainable=True), "default"))
    assert all((moved[name] - start[name]).abs().max() > 1e-3 for name in start)


def test_an_embedding_with_a_scale(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    def gemma() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
        return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).eval()

    peft_model = of_peft(gemma(), {"r": 4, "target_modules": ["embed_tokens"]})
    quiet(peft_model.save_pretrained, tmp_path)
    torch.testing.assert_close(outputs(peftcore.load(gemma(), tmp_path)), outputs(peft_model), rtol=0, atol=1e-5)
