"""What a model says of itself, and a plugin that says it for a model that does not."""

import pytest
from census import instances
from support import tiny
from torch import nn

import peftcore
from peftcore.model import detect
from peftcore.plugin import hookimpl
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.registry import registry


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


def test_of_several_language_models_the_one_that_generates_is_meant() -> None:
    """MusicGen reads text and writes sound: transformers refuses to say which of its two configs is meant."""
    model = instances.build("MusicgenForConditionalGeneration")
    model.config.decoder.num_key_value_heads = 3
    with pytest.raises(ValueError, match="Multiple valid text configs"):
        model.config.get_text_config()
    assert detect(model).num_kv_heads == 3


def test_sizes_that_differ_by_stage_or_layer_are_none() -> None:
    """Swin's heads are a list, Gemma 4 refuses to give one `head_dim` for layers that differ."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig, SwinConfig, SwinModel

    swin = detect(SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], image_size=16, window_size=2)))
    assert (swin.num_heads, swin.head_dim, swin.hidden_size) == (None, None, 16)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size_per_layer_input": 96}
    gemma = detect(Gemma4ForCausalLM(Gemma4TextConfig(**sizes, global_head_dim=16, hidden_size_per_layer_input=8)))
    assert (gemma.num_heads, gemma.num_kv_heads, gemma.embedding) == (4, 2, "model.embed_tokens")


def test_an_embedding_of_patches_is_not_one_of_tokens() -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes))
    assert detect(model).embedding is None
    with pytest.raises(peftcore.PeftcoreError, match="needs a token embedding"):
        peftcore.apply(model, "prompt-tuning", num_virtual_tokens=2)


def test_any_module_has_an_empty_one() -> None:
    assert detect(nn.Linear(2, 2)) == Architecture()


def test_an_adapted_model_is_read_like_its_base() -> None:
    with tiny.installed(tiny.method("soft", tiny.PLACES["soft"])):
        assert detect(peftcore.apply(tiny.llama(), "soft")) == detect(tiny.llama())


def test_a_plugin_answers_first() -> None:
    class Mine:
        @hookimpl
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
