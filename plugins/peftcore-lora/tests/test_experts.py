"""LoRA as it is reaches the experts of every family: trained, saved, merged, removed, beside PEFT both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.against_peft import logits, moved, quiet
from support.mixtures import FAMILIES, mixture
from support.whole_run import nightly_but
from torch import nn

import peftcore
from peftcore.engine import applied
from peftcore.engine.adaptation.adapted import adapters_at
from peftcore.plugin import disturb


def config_of(model: nn.Module) -> Any:
    return applied(model, "default").config


# modules of experts, how many of each a token meets, and what share of the parameters experts are
MIXTURES = {
    "mixtral": (2, 2, 72.3),
    "qwen3_moe": (2, 2, 65.9),
    "gpt_oss": (2, 2, 78.3),
    "granitemoe": (2, 2, 72.3),
    "deepseek_v3": (1, 2, 36),
    "qwen3_next": (2, 2, 53.5),
    "ernie4_5_moe": (1, 2, 30.5),
    "olmoe": (2, 2, 72.2),
    "glm4_moe": (1, 2, 36.1),
    "minimax": (2, 2, 79.5),
    "llama4_text": (1, 1, 49.7),
    "gemma4_text": (2, 2, 50.7),
}


# One family of each layout: weights `[E, out, in]`; `[E, in, out]` with biases; experts next to shared ones and after
# dense layers; and a forward that adapters cannot call in parts.
LAYOUTS = ("qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text")


@pytest.mark.filterwarnings("ignore:Hugging Face PEFT cannot read this file")  # layers that it takes for experts
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", nightly_but(FAMILIES, LAYOUTS))
def test_family(family: str, quantized: bool, tmp_path: Path) -> None:
    def new() -> nn.Module:
        return peftcore.quantize(mixture(family)) if quantized else mixture(family)

    base, model = new(), new()
    plan = peftcore.plan(model, "lora", r=4)
    assert plan.coverage.share > 0.95  # but for routers, and convolutions of Qwen3-Next
    peftcore.apply(model, "lora", r=4)
    modules, per_token, share = MIXTURES[family]
    way = "on dense copies of all weights, without dropout: Llama4TextExperts" if family == "llama4_text" else "fused"
    for text in (str(plan), str(peftcore.summary(model))):
        sentence = next(line for line in text.splitlines() if line.startswith("experts: "))
        assert sentence.startswith(
            f"experts: {modules} modules of 4, {share} % of the parameters; 100 % with an adapter, "
        )
        assert (
            f"{100 * quantized} % in 4 bits; a token meets {per_token} of 4, " in sentence
            and f" in all; {way}" in sentence
        )
    # The fused experts sum in another order: Qwen3-Next's logits (up to 3.1) are 1.2e-6 apart, each 4e-6 from float64.
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=4e-6)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    tokens, losses = torch.arange(3, 27).view(2, 12), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    experts = {path: adapters_at(model.get_submodule(path))["default"] for path in applied(model, "default").paths}
    experts = {path: each for path, each in experts.items() if path.endswith(".experts")}
    assert experts and all(p.grad is not None and p.grad.any() for each in experts.values() for p in each.parameters())
    acting = logits(model)
    peftcore.save(model, tmp_path)
    assert torch.equal(logits(peftcore.load(new(), tmp_path)), acting)
    peftcore.merge(model, dtype=torch.float32 if quantized else None, undo=True)
    # Merged weights are summed in another order, by other kernels: logits up to 3.3 are 4e-6 apart with AVX-512, and
    # 1.03e-5 with AVX2.
    torch.testing.assert_close(logits(model), acting, rtol=0, atol=3e-5)
    peftcore.unmerge(model)
    assert torch.equal(logits(model), acting)
    peftcore.remove(model)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())


# Layers of dense and shared blocks that PEFT takes for experts of old files are left out.
OTHERS = {
    "deepseek_v3": ["mlp", "shared_experts"],
    "glm4_moe": ["mlp", "shared_experts"],
    "ernie4_5_moe": ["mlp", "shared_experts"],
    "qwen3_next": ["shared_expert"],
}


@pytest.mark.filterwarnings("ignore:lora_dropout=0.1 has no effect at 2 of")  # Llama 4's experts
@pytest.mark.parametrize("family", nightly_but(FAMILIES, LAYOUTS))
def test_against_peft(family: str, tmp_path: Path) -> None:
    out = [f"{block}.{name}" for block in OTHERS.get(family, ()) for name in ("gate_proj", "up_proj", "down_proj")]
    peftcore_model = peftcore.apply(mixture(family), "lora", r=4, lora_dropout=0.1, exclude_modules=out or None)
    disturb(peftcore_model, "default", seed=1)
    peftcore.save(peftcore_model, tmp_path / "ours")
    reloaded = peftcore.load(mixture(family), tmp_path / "ours")
    assert torch.equal(logits(reloaded), logits(peftcore_model)) and config_of(reloaded).lora_dropout == 0.1
    peft_model = quiet(peft.PeftModel.from_pretrained, mixture(family), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(peft_model), logits(peftcore_model), rtol=0, atol=1e-5)
    names = ("r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
    fields = {name: getattr(config_of(peftcore_model), name) for name in names}
    peft_model = moved(
        quiet(peft.get_peft_model, mixture(family), peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    )
    quiet(peft_model.save_pretrained, tmp_path / "theirs")
    torch.testing.assert_close(
        logits(peftcore.load(mixture(family), tmp_path / "theirs")), logits(peft_model), rtol=0, atol=1e-5
    )


def test_a_file_of_pefts_all_linear(tmp_path: Path) -> None:
    """PEFT adapts experts, too, with twice the rank at gate and up, and routers."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    peft_model = moved(quiet(peft.get_peft_model, mixture("qwen3_moe"), config).eval())
    quiet(peft_model.save_pretrained, tmp_path)
    peftcore_model = peftcore.load(mixture("qwen3_moe"), tmp_path)
    torch.testing.assert_close(logits(peftcore_model), logits(peft_model), rtol=0, atol=1e-5)


BOTH = ["experts.down_proj", "experts.gate_up_proj"]


@pytest.mark.filterwarnings("ignore:lora on .* reaches")
@pytest.mark.parametrize(
    ("family", "fields", "modules", "parameters", "ranks"),
    [
        ("qwen3_moe", {}, 8, BOTH, {"experts.down_proj": 4, "experts.gate_up_proj": 4}),  # 8 over the 2 of a token
        ("qwen3_moe", {"target_modules": ["experts"], "r": 1}, 0, BOTH, {}),
        ("qwen3_moe", {"target_modules": ["q_proj", "down_proj"], "expert_r": 3}, 2, BOTH[:1], {BOTH[0]: 3}),
        ("qwen3_moe", {"target_modules": ".*experts.gate.*"}, 0, BOTH[1:], {BOTH[1]: 4}),
        ("qwen3_moe", {"rank_pattern": {"down_proj": 6}}, 8, BOTH, {"down_proj": 6, BOTH[1]: 4}),
        ("qwen3_moe", {"exclude_modules": ["experts"]}, 8, [], {}),
        ("qwen3_moe", {"exclude_modules": ["gate_up_proj"]}, 8, BOTH[:1], {BOTH[0]: 4}),
        ("qwen3_moe", {"target_parameters": []}, 8, [], {}),
        ("qwen3_moe", {"target_parameters": BOTH[:1]}, 8, BOTH[:1], {}),  # as in PEFT
        ("qwen3_moe", {"modules_to_save": ["experts"]}, 8, [], {}),
        ("deepseek_v3", {"target_modules": ["down_proj"]}, 2, [], {}),  # of linear layers, as ever
        ("deepseek_v3", {"target_modules": ".*experts.*"}, 3, [], {}),
        ("deepseek_v3", {"layers_to_transform": [0]}, 8, [], {}),
        ("llama4_text", {"target_modules": ["feed_forward.experts"]}, 0, BOTH, {}),
        ("llama4_text", {"target_modules": ["router"]}, 1, [], {}),
        ("llama4_text", {}, 14, BOTH, {}),  # without the router, a linear layer
    ],
)
def test_what_reaches_experts(
    family: str, fields: dict[str, Any], modules: int, parameters: list[str], ranks: dict[str, int]
) -> None:
    model = mixture(family)
    peftcore.apply(model, "lora", **fields)
    config = config_of(model)
    assert (list(config.target_parameters), config.rank_pattern, config.expert_r) == (parameters, ranks, None)
    text = [path for path in applied(model, "default").paths if not path.endswith("mlp.experts")]
    assert len([path for path in text if not path.endswith("feed_forward.experts")]) == modules
    for path in {*applied(model, "default").paths} - {*text}:  # the scale is that of the other layers
        for adapter in adapters_at(model.get_submodule(path))["default"].changes.values():
            assert adapter.scale == config.lora_alpha / config.r or "rank_pattern" in fields or parameters == BOTH[:1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["gate_proj"]}, r"'gate_proj' matches no module \(nearest: 'gate_up_proj'"),
        ({"target_modules": ["q_proj"], "expert_r": 2}, "expert_r=2 has no effect, because no experts are selected"),
        ({"target_modules": ["experts"], "lora_bias": True}, "lora_bias=True is not possible"),
        ({"target_modules": ["experts"], "lora_fa": True}, "lora_fa=True is only for linear layers"),
        ({"target_modules": ["experts"], "init_lora_weights": "pissa"}, "'pissa' is only for linear layers"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(mixture("qwen3_moe"), "lora", **fields)


@pytest.mark.filterwarnings("ignore:lora on Qwen3Moe")
def test_experts_are_left_out_aloud() -> None:
    with pytest.warns(UserWarning, match="lora_fa=True is supported only for linear layers, so experts are left out"):
        peftcore.apply(mixture("qwen3_moe"), "lora", lora_fa=True)


@pytest.mark.filterwarnings("ignore:lora on Qwen3Moe")
def test_expert_parallelism_is_refused() -> None:
    model = mixture("qwen3_moe")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(peftcore.PeftcoreError, match=r"layers.1.mlp.experts' are spread over processes"):
        peftcore.apply(model, "lora")
    peftcore.apply(model, "lora", exclude_modules=["experts"])


def test_swapped() -> None:
    """Tensors by their names on disk, of experts whose in and out are equal, too (64 and 2 · 32)."""
    model, other_model = (peftcore.apply(mixture("qwen3_moe"), "lora", r=4) for _ in range(2))
    disturb(other_model, "default", seed=1)
    peftcore.set_state_dict(model, "default", peftcore.state_dict(other_model, "default"))
    assert torch.equal(logits(model), logits(other_model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_combined_and_scaled(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    for seed, (name, r) in enumerate({"a": 4, "b": 2}.items()):
        peftcore.apply(model, "lora", r=r, adapter=name)
        disturb(model, name, seed=seed)
    peftcore.scale(model, "a", 0.5)
    peftcore.activate(model, ["a", "b"])
    expected = logits(model)
    peftcore.combine(model, ["a", "b"], adapter="sum", how="cat")
    peftcore.combine(model, ["a", "b"], adapter="nearest", how="svd", r=6)
    for name in ("sum", "nearest"):
        peftcore.activate(model, [name])
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=5e-5)
    peftcore.save(model, tmp_path, adapter="sum")
    peftcore.scale(model, "a", 0.0)
    peftcore.activate(model, ["a"])
    torch.testing.assert_close(logits(model), logits(mixture(family)), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(peftcore.load(mixture(family), tmp_path)), expected, rtol=0, atol=5e-5)
    peftcore.activate(model, ["b"])
    expected = logits(model)
    assert min(peftcore.convert(model, "b", method="lora", r=2).values()) > 0.9999  # as it is one of this rank
    peftcore.activate(model, ["b-lora"])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=5e-5)
