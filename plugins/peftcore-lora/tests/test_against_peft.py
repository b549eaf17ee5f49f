"""Hugging Face PEFT reads what is saved here, and the other way round, with the same logits."""

from __future__ import annotations

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

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"r": 4, "lora_alpha": 16}) for name in tiny.MODELS},
    "rank_pattern": (
        "llama",
        {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 32}},
    ),
    "rslora": ("llama", {"r": 4, "use_rslora": True, "lora_alpha": 3}),
    "modules_to_save": ("llama", {"r": 4, "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}),
    "norms saved": ("llama", {"r": 2, "modules_to_save": ["input_layernorm"], "target_modules": ["q_proj"]}),
    "regular expression": ("llama", {"r": 4, "target_modules": r".*layers\.1\..*(up|down)_proj"}),
    "layers": ("llama", {"r": 4, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}),
    "excluded": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]}),
    "bias all": ("bert", {"r": 4, "bias": "all", "target_modules": ["query", "value"]}),
    "gaussian": ("gpt2", {"r": 4, "init_lora_weights": "gaussian"}),
    "roberta": ("roberta", {"r": 4}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
}
MODELS = {**tiny.MODELS, "roberta": tiny.roberta_classifier}


@pytest.fixture(params=list(CASES))
def case(request) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """(a base for us, the same base for PEFT, fields of the config)."""
    kind, fields = CASES[request.param]
    return MODELS[kind](), MODELS[kind](), fields


def logits(model: nn.Module) -> Tensor:
    """Logits of a model of ours or PEFT's."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        return model(**tiny.inputs(inner)).logits


def quiet(call, *args: Any, **kwargs: Any) -> Any:
    """PEFT warns of GPT-2's layout, of saved embeddings and of its own optional kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def test_peft_reads_ours(case, tmp_path: Path) -> None:
    peftcore_model, peft_model, fields = case
    peftcore.apply(peftcore_model, "lora", **fields)
    disturb(peftcore_model, "default", seed=1)
    assert (logits(peftcore_model) - logits(peft_model)).abs().max() > 1e-3
    peftcore.save(peftcore_model, tmp_path)
    peft_model = quiet(peft.PeftModel.from_pretrained, peft_model, tmp_path).eval()
    torch.testing.assert_close(logits(peft_model), logits(peftcore_model), rtol=0, atol=1e-5)


def test_ours_reads_peft(case, tmp_path: Path) -> None:
    peftcore_model, peft_model, fields = case
    task = peftcore.model.detect(peftcore_model).task_type
    fields = {"target_modules": "all-linear", **fields}
    peft_model = quiet(peft.get_peft_model, peft_model, peft.LoraConfig(task_type=task, **fields)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    base = logits(peftcore_model)
    quiet(peft_model.save_pretrained, tmp_path)
    peftcore.load(peftcore_model, tmp_path)
    assert (logits(peftcore_model) - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(peftcore_model), logits(peft_model), rtol=0, atol=1e-5)


def test_the_same_start_trains_to_the_same_place(tmp_path: Path) -> None:
    """From one file, three AdamW steps here and in PEFT end at the same factors."""
    peftcore.save(peftcore.apply(tiny.llama(), "lora", r=4, lora_alpha=16), tmp_path)
    peftcore_model = peftcore.load(tiny.llama(), tmp_path, trainable=True)
    peft_model = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path, is_trainable=True)
    for model in (peftcore_model, peft_model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
            optimizer.step()
    expected = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p
        for name, p in peft_model.named_parameters()
        if p.requires_grad
    }
    actual = {name: p for name, p in adapter_parameters(peftcore_model, "default")}
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6)


def test_bf16_base_is_as_close_to_fp32_as_peft_is(tmp_path: Path) -> None:
    reference = peftcore.apply(tiny.llama().double(), "lora", r=4, lora_alpha=16)
    disturb(reference, "default", seed=1)
    peftcore.save(reference, tmp_path, dtype=torch.float32)
    peftcore_model = peftcore.load(tiny.llama().bfloat16(), tmp_path)
    peft_model = quiet(peft.PeftModel.from_pretrained, tiny.llama().bfloat16(), tmp_path)
    expected = logits(reference)
    errors = [(logits(model).double() - expected).square().mean().sqrt() for model in (peftcore_model, peft_model)]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, r"cannot be read: it has use_dora: DoRA is another method, whose plugin is not installed"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4', for which PEFT changes the base"),
    ],
)
def test_what_is_not_here_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **fields)
    quiet(quiet(peft.get_peft_model, tiny.llama(), config).save_pretrained, tmp_path)
    with pytest.raises(peftcore.CheckpointError, match=message):
        peftcore.load(tiny.llama(), tmp_path, method="lora")


def tied_llama() -> nn.Module:
    model = tiny.llama()
    config = type(model.config).from_dict({**model.config.to_dict(), "tie_word_embeddings": True})
    torch.manual_seed(0)
    return type(model)(config).eval()


TIED = {"llama": (tied_llama, "embed_tokens", ["q_proj"]), "gpt2": (tiny.gpt2, "wte", ["c_attn"])}


@pytest.fixture(
    params=[(kind, modules_to_save) for kind in TIED for modules_to_save in ("embedding", "head", "both")], ids=str
)
def tied(request) -> tuple[Any, dict[str, Any]]:
    """(makes a model with tied embeddings, fields of the config)."""
    kind, modules_to_save = request.param
    make, embedding, targets = TIED[kind]
    modules_to_save = {"embedding": [embedding], "head": ["lm_head"], "both": [embedding, "lm_head"]}[modules_to_save]
    return make, {"r": 4, "target_modules": targets, "modules_to_save": modules_to_save}


@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_tied_embeddings_of_ours(tied, together: bool, tmp_path: Path) -> None:
    make, fields = tied
    peftcore_model = peftcore.apply(make(), "lora", ensure_weight_tying=together, **fields)
    disturb(peftcore_model, "default", seed=1)
    is_tied = peftcore_model.lm_head.weight is peftcore_model.get_input_embeddings().weight
    assert is_tied == together
    peftcore.save(peftcore_model, tmp_path)
    reloaded = peftcore.load(make(), tmp_path)
    assert (reloaded.lm_head.weight is reloaded.get_input_embeddings().weight) == together
    assert torch.equal(logits(reloaded), logits(peftcore_model))
    peft_model = quiet(peft.PeftModel.from_pretrained, make(), tmp_path).eval()
    torch.testing.assert_close(logits(peft_model), logits(peftcore_model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_tied_embeddings_of_peft(tied, together: bool, tmp_path: Path) -> None:
    make, fields = tied
    config = peft.LoraConfig(task_type="CAUSAL_LM", ensure_weight_tying=together, **fields)
    peft_model = quiet(peft.get_peft_model, make(), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    quiet(peft_model.save_pretrained, tmp_path)
    peftcore_model = peftcore.load(make(), tmp_path)
    torch.testing.assert_close(logits(peftcore_model), logits(peft_model), rtol=0, atol=1e-5)


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    file = peftcore.save(peftcore.apply(tied_llama(), "lora", **fields), tmp_path) / "adapter_model.safetensors"
    with safetensors.safe_open(file, "pt") as archive:
        metadata = archive.metadata()
    tensors = safetensors.torch.load_file(file)
    tensors["base_model.model.lm_head.weight"].mul_(2)
    safetensors.torch.save_file(tensors, file, metadata)
    tiny.without_hash(tmp_path)
    with pytest.raises(peftcore.CheckpointError, match=r"embed_tokens.weight.* this model ties the two"):
        peftcore.load(tied_llama(), tmp_path)


def test_a_target_that_is_tied_to_a_saved_module_is_refused() -> None:
    with pytest.raises(
        peftcore.PeftcoreError, match=r"selects 'lm_head', whose weight is tied .*ensure_weight_tying=False"
    ):
        peftcore.apply(tied_llama(), "lora", target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])


def test_merging_what_was_trained_apart_unties() -> None:
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": False}
    model = peftcore.apply(tied_llama(), "lora", **fields)
    disturb(model, "default", seed=1)
    expected = logits(model)
    with pytest.raises(peftcore.PeftcoreError, match=r"'model.embed_tokens' is tied to 'lm_head.weight'.*untie=True"):
        peftcore.merge(model, undo=True)
    with pytest.warns(UserWarning, match="merge untied 'model.embed_tokens'"):
        peftcore.merge(model, untie=True, undo=True)
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_labels=3, **sizes)).eval()


def scores(model: nn.Module) -> Tensor:
    images = torch.linspace(-1, 3, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)
    return model(pixel_values=images).logits


@pytest.mark.parametrize("saved", [["classifier"], ["classifier", "normalization"]], ids=str)
def test_statistics_of_batchnorms(saved: list[str], tmp_path: Path) -> None:
    """They move in training. Ours are in the file for both; PEFT's, where modules_to_save names the layers."""
    fields = {"r": 2, "target_modules": ["convolution"], "modules_to_save": saved}
    peftcore_model = peftcore.apply(resnet(), "lora", **fields)
    with torch.no_grad():
        scores(peftcore_model.train())
        peftcore.save(peftcore_model.eval(), tmp_path / "ours")
        peft_model = quiet(peft.PeftModel.from_pretrained, resnet(), tmp_path / "ours").eval()
        assert torch.equal(scores(peft_model), scores(peftcore_model))
        assert (scores(peftcore_model) - scores(resnet())).abs().max() > 1e-3
        peft_model = quiet(peft.get_peft_model, resnet(), peft.LoraConfig(**fields, init_lora_weights=False))
        scores(peft_model.train())
        quiet(peft_model.save_pretrained, tmp_path / "theirs")
        reloaded = quiet(peft.PeftModel.from_pretrained, resnet(), tmp_path / "theirs").eval()
        expected, actual = scores(reloaded), scores(peftcore.load(resnet(), tmp_path / "theirs"))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def deepseek() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sparse = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = DeepseekV3Config(vocab_size=96, n_group=1, topk_group=1, **sizes, **sparse, **latent)
    return DeepseekV3ForCausalLM(config).eval()


def test_modules_that_peft_takes_for_experts_are_reported(tmp_path: Path) -> None:
    model = peftcore.apply(deepseek(), "lora", r=2)
    disturb(model, "default", seed=1)
    names = r"\['mlp.down_proj', .*'shared_experts.up_proj'\]"
    with pytest.warns(UserWarning, match=rf"PEFT cannot read .*layers.0.mlp.gate_proj'.*exclude_modules={names}"):
        peftcore.save(model, tmp_path / "all")
    assert torch.equal(logits(peftcore.load(deepseek(), tmp_path / "all")), logits(model))
    peftcore.remove(model)
    named = ["down_proj", "gate_proj", "up_proj"]
    others = [f"{block}.{name}" for block in ("mlp", "shared_experts") for name in named]
    peftcore.apply(model, "lora", r=2, exclude_modules=others)
    disturb(model, "default", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftcore.save(model, tmp_path / "others")
    peft_model = quiet(peft.PeftModel.from_pretrained, deepseek(), tmp_path / "others").eval()
    torch.testing.assert_close(logits(peft_model), logits(model), rtol=0, atol=1e-5)
