"""What a model says of itself, and a plugin that says it for a model that does not."""

import pytest
import tiny
from torch import nn

import peftcore
from peftcore.architecture import Architecture, detect
from peftcore.registry import registry


def test_llama() -> None:
    found = detect(tiny.llama())
    assert (found.task_type, found.backbone, found.embedding, found.output_head) == (
        "CAUSAL_LM",
        "model",
        "model.embed_tokens",
        "lm_head",
    )
    assert (found.num_layers, found.num_heads, found.num_kv_heads, found.head_dim, found.hidden_size) == (
        2,
        4,
        2,
        8,
        32,
    )
    assert found.cache_argument in ("cache", "past_key_values")
    assert found.task_heads == ()


def test_classifiers_have_heads_that_nothing_trained() -> None:
    assert detect(tiny.bert_classifier()).task_heads == ("classifier",)
    assert detect(tiny.bert_classifier()).task_type == "SEQ_CLS"
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    distilbert = DistilBertForSequenceClassification(DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16))
    assert detect(distilbert).task_heads == ("pre_classifier", "classifier")


def test_t5_has_two_stacks() -> None:
    found = detect(tiny.t5())
    assert (found.task_type, found.encoder, found.decoder) == ("SEQ_2_SEQ_LM", "encoder", "decoder")


def test_any_module_has_an_empty_one() -> None:
    assert detect(nn.Linear(2, 2)) == Architecture()


def test_an_adapted_model_is_read_like_its_base() -> None:
    with tiny.installed(tiny.method("soft", tiny.PLACES["soft"])):
        assert detect(peftcore.apply(tiny.llama(), "soft")) == detect(tiny.llama())


def test_a_plugin_answers_first() -> None:
    class Mine:
        @peftcore.hookimpl
        def peftcore_architecture(self, model: nn.Module) -> Architecture | None:
            return Architecture(output_head="out") if isinstance(model, nn.Sequential) else None

    registry.register("mine", Mine())
    try:
        assert detect(nn.Sequential(nn.Linear(2, 2))).output_head == "out"
        assert detect(tiny.llama()).output_head == "lm_head"
    finally:
        registry.unregister("mine")
    assert detect(nn.Sequential()) == Architecture()


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_paths_are_paths_of_the_model(kind: str) -> None:
    model = tiny.MODELS[kind]()
    found = detect(model)
    for path in (found.backbone, found.embedding, found.output_head, *found.task_heads):
        assert path is None or isinstance(model.get_submodule(path), nn.Module)
