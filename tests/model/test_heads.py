"""Which modules pre-training did not train, and that they are saved: another load draws them anew."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from support import against_peft, tiny
from torch import nn

import peftcore
from peftcore.model import detect
from peftcore.model.inputs import example_inputs
from peftcore.testing import disturb

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
SPEECH = {
    **SMALL,
    **{"conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_conv_pos_embeddings": 8},
    **{"num_conv_pos_embedding_groups": 2, "vocab_size": 20, "classifier_proj_size": 8, "apply_spec_augment": False},
    **{"num_feat_extract_layers": 2, "tdnn_dim": (16,), "tdnn_kernel": (3,), "tdnn_dilation": (1,)},
}
SEGFORMER = {
    **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "strides": [4, 2]},
    **{"patch_sizes": [7, 3], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
}

# A class, fields of its config, and its heads.
CASES = {
    "BertForTokenClassification": ({**SMALL, "vocab_size": 96}, ("classifier",)),
    "DistilBertForSequenceClassification": (
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 96},
        ("pre_classifier", "classifier"),
    ),
    "LlamaForQuestionAnswering": ({**SMALL, "vocab_size": 96}, ("qa_outputs",)),
    "ViTForImageClassification": (VISION, ("classifier",)),
    "SiglipForImageClassification": ({"vision_config": VISION, "text_config": SMALL}, ("classifier",)),
    "CLIPForImageClassification": ({"vision_config": VISION, "text_config": SMALL}, ("classifier",)),
    "YolosForObjectDetection": (
        {**VISION, "image_size": [32, 32], "num_detection_tokens": 5},
        ("class_labels_classifier", "bbox_predictor"),
    ),
    "DetrForObjectDetection": (
        {
            **{"use_timm_backbone": False, "backbone": None, "d_model": 32, "num_queries": 5, "encoder_layers": 1},
            **{"decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
            **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
            "backbone_config": transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
            ),
        },
        ("class_labels_classifier", "bbox_predictor"),
    ),
    "SegformerForSemanticSegmentation": (SEGFORMER, ("decode_head",)),
    "Wav2Vec2ForCTC": (SPEECH, ("lm_head",)),
    "Wav2Vec2ForSequenceClassification": (SPEECH, ("projector", "classifier")),
    "Wav2Vec2ForXVector": (SPEECH, ("projector", "tdnn", "feature_extractor", "classifier", "objective")),
    "VideoMAEForVideoClassification": ({**VISION, "num_frames": 4}, ("fc_norm", "classifier")),
}


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def rt_detr() -> nn.Module:
    """A detector with heads that depend on the labels inside its backbone."""
    backbone = transformers.RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    sizes = {"encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "encoder_ffn_dim": 32, "d_model": 32}
    decoder = {"decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 32, "decoder_layers": 2, "num_queries": 5}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_denoising": 2, "num_labels": 3}
    config = transformers.RTDetrConfig(backbone_config=backbone, **sizes, **decoder, **heads)
    return transformers.RTDetrForObjectDetection(config)


def made(name: str, seed: int = 0) -> nn.Module:
    """An instance whose values are large enough to be seen, the heads by `seed`."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**CASES[name][0])).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in CASES[name][1]:
            for parameter in model.get_submodule(head).parameters():
                parameter.normal_(std=0.2, generator=generator)
    return model


def outputs(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(**example_inputs(model)).to_tuple()
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("name", list(CASES))
def test_heads_are_found_trained_and_saved(name: str, tmp_path: Path) -> None:
    model, base = made(name), outputs(made(name))
    assert detect(model).task_heads == CASES[name][1]
    peftcore.apply(model, "lora", r=2, target_modules=r".*(query|q_lin|q_proj|self\.value)")
    disturb(model, "default", seed=1)
    wanted = outputs(model)
    assert max((a - b).abs().max() for a, b in zip(wanted, base, strict=True)) > 1e-3
    peftcore.save(model, tmp_path)
    found = outputs(peftcore.load(made(name, seed=7), tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5])
def test_heads_of_language_models_are_not_new(make) -> None:
    assert detect(make()).task_heads == ()


def test_bare_models_and_models_of_two_towers_have_none() -> None:
    assert detect(tiny.bert_classifier().bert).task_heads == ()
    fields = CASES["CLIPForImageClassification"][0]
    assert detect(transformers.CLIPModel(transformers.CLIPConfig(**fields))).task_heads == ()


def test_a_class_that_nobody_lists_has_what_stands_beside_its_backbone() -> None:
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, num_labels=1)
    assert detect(transformers.GPT2DoubleHeadsModel(config)).task_heads == ("multiple_choice_head",)


def test_what_the_checkpoint_did_not_have(tmp_path: Path) -> None:
    """Told by what was loaded, for any class: the head of a language model here, a pooler there."""
    tiny.bert_classifier().bert.save_pretrained(tmp_path / "with pooler")
    masked = transformers.BertForMaskedLM.from_pretrained(tmp_path / "with pooler")
    transform = "cls.predictions.transform"
    assert detect(masked).task_heads == (f"{transform}.dense", f"{transform}.LayerNorm")
    masked.save_pretrained(tmp_path / "without")
    assert detect(transformers.BertForMaskedLM.from_pretrained(tmp_path / "without")).task_heads == ()
    classifier = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "without")
    assert detect(classifier).task_heads == ("classifier", "bert.pooler.dense")
    model = peftcore.apply(classifier, "lora", r=2)
    assert detect(model).task_heads == ("classifier", "bert.pooler.dense")
    disturb(model.eval(), "default", seed=1)
    wanted = tiny.logits(model)
    peftcore.save(model, tmp_path / "adapter")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "without").eval()
    assert torch.equal(tiny.logits(peftcore.load(again, tmp_path / "adapter")), wanted)


def test_heads_inside_the_backbone_of_a_detector_with_other_labels(tmp_path: Path) -> None:
    rt_detr().save_pretrained(tmp_path)
    cls = transformers.RTDetrForObjectDetection
    assert detect(cls.from_pretrained(tmp_path)).task_heads == ()
    labels = {"num_labels": 5, "ignore_mismatched_sizes": True}
    assert detect(cls.from_pretrained(tmp_path, **labels)).task_heads == (
        "model.denoising_class_embed",
        "model.enc_score_head",
        *("model.decoder.class_embed.0", "model.decoder.class_embed.1"),
    )


def test_merged_and_dequantized_layers_are_not_new(tmp_path: Path) -> None:
    tiny.bert_classifier().save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    peftcore.merge(peftcore.apply(model, "lora", r=2, target_modules=["query"]))
    assert detect(model).task_heads == ("classifier",)
    peftcore.dequantize(peftcore.quantize(model, skip=["key", "value", "dense", "classifier"]))
    assert detect(model).task_heads == ("classifier",)


def test_a_head_that_is_not_in_the_file_is_another_base(tmp_path: Path) -> None:
    model = peftcore.apply(made("YolosForObjectDetection"), "lora", target_modules=["query"], modules_to_save=[])
    peftcore.save(model, tmp_path)
    peftcore.load(made("YolosForObjectDetection"), tmp_path)
    with pytest.raises(peftcore.CheckpointError, match=r"'class_labels_classifier\..*\(a head, .*modules_to_save"):
        peftcore.load(made("YolosForObjectDetection", seed=7), tmp_path)


def test_a_file_of_peft_without_a_head(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)
    theirs = against_peft.quiet(peft.get_peft_model, tiny.bert_classifier(), config).eval()
    against_peft.quiet(theirs.save_pretrained, tmp_path)
    model = peftcore.load(tiny.bert_classifier(), tmp_path)
    torch.testing.assert_close(tiny.logits(model), against_peft.logits(theirs), rtol=0, atol=1e-6)
