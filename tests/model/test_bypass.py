"""Layers whose weight is read while they are not called: seen in one forward, or listed for cards and training."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from census import instances
from support import tiny
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore.engine import applied
from peftcore.model import bypassed_layers, layers_read_for_dtype, rewritten_layers
from peftcore.quantization import quantized_layers


class Mixed(nn.Module):
    """`read` is read and not called, `asked` is asked for its dtype, `idle` is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.asked, self.idle = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.called(x), self.read.weight)
        return self.asked(x.to(self.asked.weight.dtype))


def test_what_is_bypassed() -> None:
    model = Mixed()
    assert bypassed_layers(model) == {"read": "the model's own forward reads its weight without calling it"}
    assert layers_read_for_dtype(model) == ["asked"]
    peftcore.apply(model, "lora", target_modules="all-linear")
    assert applied(model, "default").paths == ("called", "asked", "idle")  # not reached is not known, and no reason
    with pytest.raises(peftcore.PeftcoreError, match=r"on 'read' would have no effect, .*reads its weight.*\['read'\]"):
        peftcore.apply(Mixed(), "lora", target_modules=["read", "called"])


class ReadOnly(nn.Module):
    """Its convolution and its table are read and not called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.head = nn.Conv2d(3, 4, 3), nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(x, self.conv.weight).mean((2, 3)) + self.table.weight[0])


@pytest.mark.parametrize("read", ["conv", "table"])
def test_convolutions_and_embeddings_that_are_read_are_refused(read: str) -> None:
    with pytest.raises(
        peftcore.PeftcoreError, match=f"on '{read}' would have no effect.*the model's own forward reads"
    ):
        peftcore.apply(ReadOnly(), "lora", target_modules=[read, "head"])


@pytest.mark.parametrize(
    ("name", "dead"),
    [
        ("MambaForCausalLM", {"x_proj", "dt_proj", "out_proj"}),
        ("Mamba2ForCausalLM", {"out_proj"}),
        ("JambaForCausalLM", {"dt_proj"}),
        ("WavLMModel", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("T5ForConditionalGeneration", set()),  # asks for `wo.weight.dtype`
        ("Gemma3nTextModel", {"correction_coefs"}),  # read in training, in a method that is not its forward
        ("LlamaForCausalLM", set()),
    ],
)
def test_adapters_and_quantized_layers_keep_out(name: str, dead: set[str]) -> None:
    model = instances.build(name)
    linear = {path for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {path.rpartition(".")[2] for path in bypassed_layers(model) if path in linear} == dead
    call: dict[str, Any] = peftcore.model.example_inputs(model)
    for part in sorted(dead):
        with pytest.raises(peftcore.PeftcoreError, match=f"{part}' would have no effect"):
            peftcore.apply(model, "lora", target_modules=[part])
    with warnings.catch_warnings():  # of how little that is: see test_coverage.py
        warnings.simplefilter("ignore")
        peftcore.quantize(model)
        peftcore.apply(model, "lora", target_modules="all-linear", r=2)
    assert not {path.rpartition(".")[2] for path, _ in quantized_layers(model)} & dead
    torch.manual_seed(0)  # of WavLM's layers, which training drops at random
    model.train()
    model(**call)[0].float().square().sum().backward()
    adapters = dict(peftcore.engine.adapter_parameters(model, "default"))
    silent = [key for key, p in adapters.items() if p.grad is None]
    assert not silent and torch.isfinite(model(**call)[0]).all()


def test_bloom_is_adapted_as_its_config_computes() -> None:
    tokens = torch.arange(8)[None]
    settings = {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**settings)).eval()
    assert bypassed_layers(model) == {}
    peftcore.apply(model, "lora", target_modules="all-linear", r=2)
    assert applied(model, "default").paths == tuple(
        f"transformer.h.0.{name}"
        for name in ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    )
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for _, p in peftcore.engine.adapter_parameters(model, "default"))
    exact = transformers.BloomConfig(**settings, slow_but_exact=True, pretraining_tp=2)
    for name in ("self_attention.dense", "mlp.dense_4h_to_h"):
        with pytest.raises(peftcore.PeftcoreError, match=f"'transformer.h.0.{name}' would have no effect"):
            peftcore.apply(transformers.BloomForCausalLM(exact), "lora", target_modules=[name])


def test_it_is_observed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    bypassed_layers(model)
    monkeypatch.setattr("peftcore.model.tracing.meta_copy", None)
    assert bypassed_layers(model) == {}
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48)  # another model now: the copy is wanted again, and fails
    assert isinstance(peftcore.model.observe(model).error, TypeError)


def test_weights_that_the_model_changes_in_place_are_left_alone() -> None:
    model = instances.build("RwkvModel")
    parts = {f"blocks.{i}.{name}" for i in range(2) for name in ("attention.output", "feed_forward.value")}
    assert set(rewritten_layers(model)) == parts and not bypassed_layers(model)
    assert {path.rpartition(".")[2] for path in rewritten_layers(instances.build("Gemma3nTextModel"))} == {
        "prediction_coefs"
    }
    with pytest.raises(
        peftcore.PeftcoreError, match="would not follow changes of the weight: the forward of RwkvModel"
    ):
        peftcore.apply(model, "lora", target_modules=["attention.output"])
    with pytest.warns(
        UserWarning, match="'blocks.0.attention.output' and 3 more, because the forward of RwkvModel changes its"
    ):
        peftcore.quantize(model)
    assert not {path for path, _ in quantized_layers(model)} & parts
    peftcore.apply(model, "lora", target_modules="all-linear")
    assert not set(applied(model, "default").paths) & parts and len(applied(model, "default").paths) == 10


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # transformers before 5.24
def test_deberta_takes_the_default_of_peft() -> None:
    config = transformers.DebertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        relative_attention=True, pos_att_type=["c2p", "p2c"],
    )  # fmt: skip
    model = transformers.DebertaForSequenceClassification(config).eval()
    assert bypassed_layers(model).keys() == {"deberta.encoder.rel_embeddings"}
    peftcore.apply(model, "lora", target_modules=["in_proj"], r=2)
    assert applied(model, "default").paths == ("deberta.encoder.layer.0.attention.self.in_proj",)
    model(input_ids=torch.arange(6)[None], labels=torch.tensor([1])).loss.backward()
    assert all(p.grad is not None for _, p in peftcore.engine.adapter_parameters(model, "default"))


def test_layers_in_a_function_need_inputs_that_ask_for_gradients() -> None:
    model = instances.build("ReformerForMaskedLM")
    assert "reformer.encoder.layers.0.feed_forward" in peftcore.model.observe(model).in_function
    with pytest.raises(peftcore.PeftcoreError, match=r"Before apply, call model\.enable_input_require_grads\(\)"):
        peftcore.apply(model, "bitfit")
    model.enable_input_require_grads()
    peftcore.apply(model, "adapter")
    model.train()
    model(**peftcore.model.example_inputs(model))[0].square().sum().backward()
    assert all(p.grad is not None for _, p in peftcore.engine.adapter_parameters(model, "default"))
