"""Sublayers as observed are what the models do: h before the residual, x, the norm of h + x, the stream."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from support import tiny
from torch import nn

import peftcore
from peftcore.model import detect, example_inputs
from peftcore.model.sublayers import find
from peftcore.plugin.architecture import Sublayer


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    return DistilBertModel(DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=4)).eval()


def built(name: str) -> nn.Module:
    """A family of which only the class is named: sizes by the census's rules."""
    from census import instances

    return instances.build(name)


OTHERS = ("BartModel", "BloomModel", "CLIPModel", "FalconModel", "GPTJModel", "MambaModel", "MixtralModel", "OPTModel",
          "SwinModel", "Wav2Vec2Model", "WhisperModel")  # fmt: skip
MODELS = {
    **tiny.MODELS,
    "roberta": tiny.roberta_classifier,
    "distilbert": distilbert,
    **{name: partial(built, name) for name in OTHERS},
}
COUNTS = {"t5": 2 * 2 + 2 * 3, "BartModel": 10, "WhisperModel": 10, "CLIPModel": 8, "MambaModel": 2, "SwinModel": 8}


OUTPUT_PROJECTIONS = {
    "llama": "model.layers.0.self_attn.o_proj",
    "gpt2": "transformer.h.0.attn.c_proj",
    "bert": "bert.encoder.layer.0.attention.output.dense",
    "distilbert": "transformer.layer.0.attention.out_lin",
    "BartModel": "encoder.layers.0.self_attn.out_proj",
    "BloomModel": "h.0.self_attention.dense",
    "FalconModel": "h.0.self_attention.dense",
    "GPTJModel": "h.0.attn.out_proj",
    "MixtralModel": "layers.0.self_attn.o_proj",
    "OPTModel": "decoder.layers.0.self_attn.out_proj",
    "SwinModel": "encoder.layers.0.blocks.0.attention.o_proj",
}


def modules_of(sublayer: Sublayer) -> tuple[str | None, ...]:
    return sublayer.output, sublayer.whole, sublayer.norm, sublayer.stream, sublayer.output_projection


@pytest.mark.parametrize("kind", list(MODELS))
def test_what_is_observed_is_what_the_model_does(kind: str) -> None:
    model = MODELS[kind]()
    sublayers = detect(model).sublayers
    assert len(sublayers) == COUNTS.get(kind, 4)
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
    for path in {p for s in sublayers for p in modules_of(s) if p is not None}:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, kwargs, out, path=path: seen.update(copy.deepcopy({path: (args, kwargs, out)})),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(**example_inputs(model))

    def first(value: Any) -> torch.Tensor:
        return value[0] if isinstance(value, tuple) else value

    for sublayer in sublayers:
        h = first(seen[sublayer.output][2])
        assert h.shape[-1] == sublayer.width
        if sublayer.output_projection is not None:  # Swin's is in windows of tokens
            torch.testing.assert_close(first(seen[sublayer.output_projection][2]).reshape(h.shape), h)
        x = None
        if sublayer.whole is not None:
            args, kwargs, whole = seen[sublayer.whole]
            arguments = [*args, *kwargs.values()]
            x = arguments[1] if sublayer.adds_residual else arguments[0]
            assert h.shape == x.shape and (sublayer.adds_residual or first(whole).shape == h.shape)
        if sublayer.norm is not None and sublayer.adds_residual:  # post-norm: what is normed is h + x
            assert sublayer.stream is None
            torch.testing.assert_close(first(seen[sublayer.norm][0]), h + x)
        elif sublayer.stream not in (None, sublayer.whole) and kind not in (
            "t5",
            "SwinModel",
        ):  # Swin's h is in windows
            stream = first(seen[sublayer.stream][2])  # pre-norm: its module adds h to what came before
            others = [s for s in sublayers if s is not sublayer and s.output.startswith(f"{sublayer.stream}.")]
            came = first(seen[sublayer.stream][0] or tuple(seen[sublayer.stream][1].values()))
            added = [
                each.view(came.shape) for each in (h, *(first(seen[s.output][2]) for s in others))
            ]  # OPT's are rows
            torch.testing.assert_close(stream, came + sum(added))


def test_facts_of_families_without_a_table() -> None:
    """Kinds, norms and stages, where the names of modules say nothing."""
    bart = find(built("BartModel"))
    assert {s.whole is None for s in bart if s.kind == "feed_forward"} == {
        True
    }  # fc1 and fc2 stand in the layer itself
    assert {s.norm for s in bart if s.output == "encoder.layers.0.fc2"} == {"encoder.layers.0.final_layer_norm"}
    kinds = ["attention", "feed_forward", "attention", "cross_attention", "feed_forward"]
    assert [s.kind for s in bart if s.layer == 1] == kinds
    swin = find(built("SwinModel"))
    assert [(s.layer, s.width) for s in swin] == [(i // 2, 16 << i // 2) for i in range(8)]
    bloom = find(built("BloomModel"))[0]
    assert (bloom.output, bloom.whole) == ("h.0.self_attention.dense", "h.0.self_attention")
    assert {s.kind for s in find(built("MambaModel"))} == {"attention"}
    assert find(built("MixtralModel"))[1].inner == ()  # experts are no layers
    assert {s.width for s in find(built("CLIPModel"))} == {32}


def test_the_model_is_left_alone() -> None:
    model = built("SwinModel").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {path: dict(module.__dict__) for path, module in model.named_modules()}
    random = torch.get_rng_state()
    assert find(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for path, module in model.named_modules():
        assert module.training and module.__dict__.keys() == attributes[path].keys()
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


def test_a_forward_that_fails_half_way_gives_none() -> None:
    model = tiny.llama()
    model.model.layers[1].mlp.__class__ = type("Failing", (nn.Module,), {"forward": lambda self, x: x.no_such_thing})
    assert find(model) == ()
    with pytest.raises(peftcore.PeftcoreError, match="attention and feed-forward modules of LlamaForCausalLM"):
        peftcore.apply(model, "adapter")


@pytest.mark.parametrize("kind", list(OUTPUT_PROJECTIONS))
def test_output_projections_of_attention(kind: str) -> None:
    paths = [s.output_projection for s in detect(MODELS[kind]()).sublayers if s.kind == "attention"]
    assert None not in paths and paths[0] == OUTPUT_PROJECTIONS[kind]


def test_cross_attention_has_an_output_projection_of_its_own() -> None:
    last = {s.kind: s.output_projection for s in find(tiny.MODELS["t5"]()) if s.output.startswith("decoder.block.1.")}
    assert last == {
        "attention": "decoder.block.1.layer.0.SelfAttention.o",
        "cross_attention": "decoder.block.1.layer.1.EncDecAttention.o",
        "feed_forward": None,
    }


class OneHead(nn.Module):
    """Attention with one head and without an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class OneHeadModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(96, 8), nn.ModuleList([OneHead(), OneHead()])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_attention_may_have_no_output_projection() -> None:
    sublayers = find(OneHeadModel())
    assert [(s.kind, s.output, s.output_projection) for s in sublayers] == [
        ("attention", "layers.0", None),
        ("attention", "layers.1", None),
    ]


def test_projections_and_layers() -> None:
    feed_forward = [s for s in find(tiny.llama()) if s.kind == "feed_forward"]
    assert [s.layer for s in feed_forward] == [0, 1]
    assert feed_forward[1].inner == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    attention = [s for s in find(tiny.MODELS["bert"]()) if s.kind == "attention"]
    assert attention[0].query == "bert.encoder.layer.0.attention.self.query"
    assert all(s.query is None for s in find(tiny.MODELS["gpt2"]()))
    kinds = [(s.kind, s.layer) for s in find(tiny.MODELS["t5"]()) if s.output.startswith("decoder")]
    assert kinds == [(kind, i) for i in (0, 1) for kind in ("attention", "cross_attention", "feed_forward")]


def test_an_adapted_model_has_the_same_sublayers(toys: None) -> None:
    model = tiny.llama()
    before = find(model)
    peftcore.apply(model, "after", target_modules=("mlp",))
    assert find(model) == before


def test_an_unknown_layer_has_none() -> None:
    assert find(nn.Sequential(nn.Linear(2, 2))) == ()


def test_a_model_that_scales_its_stream_for_evaluation_has_none_to_adapt() -> None:
    """RWKV halves the outputs of deep blocks, and the stream with them: an adapter behind them would not be halved."""
    from transformers import RwkvConfig, RwkvModel

    model = RwkvModel(RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32))
    assert find(model) == ()
    with pytest.raises(peftcore.PeftcoreError, match="attention and feed-forward modules of RwkvModel"):
        peftcore.apply(model, "adapter")


class Joined(nn.Module):
    """A linear layer of a list of tensors: what it reads is no argument of its own."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width))

    def forward(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts, -1) @ self.weight.T


class OfTuple(nn.Module):
    """A feed-forward that takes its input in a tuple, and adds it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, state: tuple[torch.Tensor]) -> torch.Tensor:
        return state[0] + self.down(self.up(self.norm(state[0])).relu())


def test_a_layer_that_adds_and_takes_a_tuple() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = nn.Embedding(8, 8), nn.ModuleList(OfTuple() for _ in range(2))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer((x,))
            return x

    assert [(s.output, s.kind, s.whole) for s in find(Model())] == [
        (f"layers.{i}.down", "feed_forward", None) for i in range(2)
    ]


def test_a_layer_that_takes_a_list_has_no_known_inside() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    class OfLists(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj([h, h])

    model = tiny.llama()
    for layer in model.model.layers:
        layer.mlp.down_proj = Joined(2 * layer.mlp.intermediate_size, model.config.hidden_size)
        layer.mlp.__class__ = OfLists
    assert [(s.kind, s.inner) for s in find(model)[:2]] == [("attention", ()), ("feed_forward", ())]
