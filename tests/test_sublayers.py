"""The table of sublayers says what the models do: h before the residual, x, the norm of h + x, the stream."""

from typing import Any

import pytest
import tiny
import torch
from torch import nn

import peftcore
from peftcore.architecture import detect
from peftcore.sublayers import find


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    return DistilBertModel(DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=4)).eval()


MODELS = {**tiny.MODELS, "roberta": tiny.roberta_classifier, "distilbert": distilbert}
COUNTS = {"t5": 2 * 2 + 2 * 3}


@pytest.mark.parametrize("kind", list(MODELS))
def test_what_the_table_says_is_what_the_model_does(kind: str) -> None:
    model = MODELS[kind]()
    sublayers = detect(model).sublayers
    assert len(sublayers) == COUNTS.get(kind, 4)
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
    for path in {p for s in sublayers for p in (s.output, s.whole, s.norm, s.stream) if p}:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, kwargs, out, path=path: seen.update({path: (args, kwargs, out)}), with_kwargs=True
        )
    with torch.no_grad():
        model(**{**({"input_ids": tiny.TOKENS} if kind == "distilbert" else tiny.inputs(model))})

    def first(value: Any) -> torch.Tensor:
        return value[0] if isinstance(value, tuple) else value

    for sublayer in sublayers:
        h = first(seen[sublayer.output][2])
        args, kwargs, _ = seen[sublayer.whole]
        arguments = [*args, *kwargs.values()]
        x = arguments[1] if sublayer.adds_residual else arguments[0]
        assert h.shape == x.shape
        if sublayer.norm is not None:  # post-norm: what is normed is h + x
            assert sublayer.stream is None
            torch.testing.assert_close(first(seen[sublayer.norm][0]), h + x)
        elif sublayer.stream is not None:  # pre-norm: the stream's module adds h to what it got, or to what came before
            stream = first(seen[sublayer.stream][2])
            others = [s for s in sublayers if s.stream is None and s.layer == sublayer.layer and kind != "t5"]
            came = first(seen[sublayer.stream][0] or tuple(seen[sublayer.stream][1].values()))
            before = came + sum(first(seen[s.output][2]) for s in others)
            torch.testing.assert_close(stream, before + h)


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
