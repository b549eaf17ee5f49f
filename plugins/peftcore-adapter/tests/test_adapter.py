"""The arithmetic, the places, the config and the errors of bottleneck adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peftcore_adapter import ACTIVATIONS
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_modules, adapter_parameters, applied
from peftcore.plugin import disturb


def f(adapter: nn.Module, x: Tensor) -> Tensor:
    """f by its formula, in float64."""
    values = {name: p.double() for name, p in adapter.named_parameters()}
    z = values["adapter_down.weight"] @ x.double()[..., None] + values["adapter_down.bias"][:, None]
    z = ACTIVATIONS[adapter.config.non_linearity](z)
    return (values["adapter_up.weight"] @ z)[..., 0] + values["adapter_up.bias"]


@given(
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    scaling=st.floats(-4, 4),
    parallel=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_formula_in_float64(width: int, out: int, activation: str, scaling: float, parallel: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(width, out)), torch.randn(3, width)
    with torch.no_grad():
        y = model(x)
        style = {"is_parallel": parallel, "scaling": scaling, "non_linearity": activation}
        peftcore.apply(model, "adapter", target_modules=["0"], bottleneck_size=1, **style)
        assert torch.equal(model(x), y)
        disturb(model, "default", seed=1, std=0.5)
        adapter = dict(adapter_modules(model, "default"))["0"]
        expected = y + scaling * f(adapter, x if parallel else y)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def model_of(family: str) -> nn.Module:
    """A tiny model of a transformers family."""
    import transformers

    config_class = getattr(transformers, f"{family}Config")
    special: dict[str, Any] = {
        "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
        "T5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
        "MT5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
        "ViT": {**SIZES, "image_size": 16, "patch_size": 8},
        "Electra": {**SIZES, "embedding_size": 32},
    }
    decoder = {"head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llamas = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "SmolLM3")
    sizes = special.get(family, {**SIZES, **(decoder if family in llamas else {})})
    torch.manual_seed(0)
    return getattr(transformers, f"{family}Model")(config_class(vocab_size=96, **sizes)).eval()


FAMILIES = {
    **dict.fromkeys(("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert", "ViT", "GPT2"), (4, 2)),
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "SmolLM3"), (4, 2)),
    **dict.fromkeys(("T5", "MT5"), (8, 4)),
}


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    if model.config.model_type == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16)}
    call = {"input_ids": tiny.TOKENS}
    if model.config.is_encoder_decoder:
        call["decoder_input_ids"] = tiny.TOKENS[:, :4]
    return call


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_has_its_places(family: str) -> None:
    """Houlsby, Pfeiffer and parallel each act, start as the identity, and stand the right number of times."""
    houlsby, pfeiffer = FAMILIES[family]
    model = model_of(family)
    inputs = inputs_of(model)
    with torch.no_grad():
        base = model(**inputs)[0]
        for style, count in (
            ({}, houlsby),
            ({"placement": "pfeiffer", "original_ln_before": True}, pfeiffer),
            ({"is_parallel": True, "scaling": 4.0}, houlsby),
        ):
            peftcore.apply(model, "adapter", bottleneck_size=4, modules_to_save=[], **style)
            assert len(applied(model, "default").paths) == count, style
            assert torch.equal(model(**inputs)[0], base), style
            disturb(model, "default", seed=1)
            assert not torch.allclose(model(**inputs)[0], base, atol=1e-3), style
            peftcore.remove(model)
            assert torch.equal(model(**inputs)[0], base)


def paths(kind: str, **fields: Any) -> tuple[str, ...]:
    model = peftcore.apply(tiny.MODELS[kind](), "adapter", bottleneck_size=4, **fields)
    return applied(model, "default").paths


def test_places_of_one_layer() -> None:
    one = {"layers_to_transform": 1}
    layer = "bert.encoder.layer.1"
    assert paths("bert", **one) == (f"{layer}.attention.output.dense", f"{layer}.output.dense")
    assert paths("bert", placement="pfeiffer", original_ln_before=True, **one) == (f"{layer}.output.LayerNorm",)
    assert paths("bert", is_parallel=True, **one) == (f"{layer}.attention.output", f"{layer}.output")
    assert paths("llama", **one) == ("model.layers.1.self_attn", "model.layers.1.mlp")
    assert paths("llama", placement="pfeiffer", original_ln_before=True, **one) == ("model.layers.1",)
    assert paths("llama", placement="attention", **one) == ("model.layers.1.self_attn",)
    assert paths("t5", placement="attention", cross_adapter=True, **one) == (
        "encoder.block.1.layer.0.SelfAttention",
        "decoder.block.1.layer.0.SelfAttention",
        "decoder.block.1.layer.1.EncDecAttention",
    )
    assert paths("llama", target_modules=["mlp"], layers_to_transform=[0]) == ("model.layers.0.mlp",)


def test_a_parallel_branch_on_bert_reads_the_sublayers_input() -> None:
    """LN(h + x + scaling · f(x)), computed from what the hooks of a plain model see."""
    model, call = tiny.MODELS["bert"](), {"input_ids": tiny.TOKENS}
    seen: dict[str, Any] = {}
    output = model.bert.encoder.layer[0].output
    handle = output.register_forward_hook(lambda module, args, out: seen.update(args=args))
    with torch.no_grad():
        model(**call)
        h, x = seen["args"]
        peftcore.apply(
            model, "adapter", placement="pfeiffer", is_parallel=True, scaling=2.0, bottleneck_size=4, adapter="p"
        )
        disturb(model, "p", seed=1)
        adapter = dict(adapter_modules(model, "p"))["bert.encoder.layer.0.output"]
        handle.remove()
        handle = output.register_forward_hook(lambda module, args, out: seen.update(out=out))
        model(**call)
        expected = output.LayerNorm(output.dense(h) + x + 2.0 * f(adapter, x).float())
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)


def test_sizes_and_what_is_trained() -> None:
    model = peftcore.apply(tiny.MODELS["bert"](), "adapter", reduction_factor=16)
    shapes = {name: tuple(p.shape) for name, p in adapter_parameters(model, "default")}
    place = "bert.encoder.layer.0.output.dense"
    assert shapes[f"{place}.adapter_down.weight"] == (2, 32)
    assert shapes[f"{place}.adapter_up.weight"] == (32, 2)
    assert shapes["classifier.weight"] == (3, 32)
    assert sum(math.prod(shape) for shape in shapes.values()) == 4 * (2 * 32 * 2 + 2 + 32) + 3 * 32 + 3
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 162 + 99
    frozen = peftcore.apply(tiny.MODELS["bert"](), "adapter", modules_to_save=[])
    assert sum(p.numel() for p in frozen.parameters() if p.requires_grad) == 4 * 162


def test_what_stands_behind_a_norm_adds_in_the_order_of_its_names() -> None:
    """norm(z + f_a(norm(z)) + f_b(norm(z + f_a(norm(z))))) for [a, b], as AdapterHub's Stack(a, b)."""
    style = {"placement": "pfeiffer", "original_ln_before": True, "bottleneck_size": 4, "modules_to_save": []}
    model, seen = tiny.MODELS["bert"](), {}
    norm = model.bert.encoder.layer[0].output.LayerNorm
    for name in "ab":
        peftcore.apply(model, "adapter", adapter=name, layers_to_transform=[0], **style)
        disturb(model, name, seed=ord(name), std=0.5)
    a, b = (dict(adapter_modules(model, name))["bert.encoder.layer.0.output.LayerNorm"] for name in "ab")
    norm.register_forward_hook(lambda module, args, out: seen.update(z=args[0], out=out))

    def plain(z: Tensor) -> Tensor:
        return nn.functional.layer_norm(z, (32,), norm.weight, norm.bias, norm.eps)

    with torch.no_grad():
        for first, second in ((a, b), (b, a)):
            model(input_ids=tiny.TOKENS)
            z = seen["z"] + f(first, plain(seen["z"])).float()
            expected = plain(z + f(second, plain(z)).float())
            torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)
            peftcore.activate(model, ["b", "a"])


@pytest.mark.parametrize("whole", [False, True])
def test_compacter_is_a_sum_of_kronecker_products(whole: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    peftcore.apply(
        model, "adapter", target_modules=["0"], bottleneck_size=4, phm_layer=True, phm_dim=2, factorized_phm_W=not whole
    )
    x = torch.randn(3, 8)
    assert torch.equal(model(x), model[0]._parameters["bias"] + x @ model[0].weight.T)
    disturb(model, "default", seed=1, std=0.5)
    adapter: Any = dict(adapter_modules(model, "default"))["0"]

    def product(layer: Any) -> Tensor:
        factors = layer.factors
        w = factors.whole if whole else factors.left @ factors.right
        return sum(torch.kron(layer.rule.whole[i], w[i]) for i in range(2))

    y = nn.functional.linear(x, model[0].weight, model[0].bias)
    z = torch.relu(y @ product(adapter.adapter_down) + adapter.adapter_down.bias)
    expected = y + z @ product(adapter.adapter_up) + adapter.adapter_up.bias
    torch.testing.assert_close(model(x), expected)
    assert adapter.adapter_down.rule is adapter.adapter_up.rule


def test_what_compacter_shares_and_trains() -> None:
    sizes = {"phm_layer": True, "bottleneck_size": 8}
    count = {}
    for name, fields in (
        ("rule", {}),
        ("all", {"shared_W_phm": True}),
        ("none", {"shared_phm_rule": False}),
        ("thin", {"factorized_phm_rule": True}),
        ("fixed", {"learn_phm": False}),
    ):
        model = peftcore.apply(tiny.llama(), "adapter", **sizes, **fields)
        count[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    biases, each = 4 * (8 + 32), 2 * 4 * (8 + 2)  # of a D or U `[32, 8]`: 4 pairs of 8 and 2
    assert count == {
        "rule": 4 * each + 64 + biases,
        "all": each + 64 + biases,
        "none": 4 * (each + 128) + biases,
        "thin": 4 * each + 32 + biases,
        "fixed": 4 * each + biases,
    }


def test_an_invertible_adapter_and_its_inverse() -> None:
    """What the head reads is what it would read if the layers changed nothing."""
    model = peftcore.apply(tiny.llama(), "adapter", inv_adapter="nice", bottleneck_size=4, adapter="lang")
    disturb(model, "lang", seed=1, std=0.5)
    modules = dict(adapter_modules(model, "lang"))
    nice: Any = modules["model.embed_tokens"]
    x = torch.randn(2, 5, 32)
    assert (nice(x) - x).abs().max() > 0.1
    torch.testing.assert_close(nice.inverse(nice(x)), x, rtol=1e-4, atol=1e-4)
    assert modules["lm_head"].network is nice
    assert "bert.embeddings" in paths("bert", inv_adapter="nice")
    assert "lm_head" not in paths("llama", inv_adapter="nice", inv_adapter_output=False)


def test_stochastic_depth_drops_whole_rows_in_training() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(64, 8)
    peftcore.apply(model, "adapter", target_modules=["0"], bottleneck_size=4, stochastic_depth=0.25)
    disturb(model, "default", seed=1)
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    with torch.no_grad():
        change = model.eval()(x) - base
        dropped = model.train()(x) - base
    kept = (dropped != 0).any(1)
    assert 0 < int((~kept).sum()) < 64
    torch.testing.assert_close(dropped[kept], change[kept] / 0.75, rtol=1e-4, atol=1e-5)


def test_a_gate_needs_rows_of_tokens() -> None:
    model = peftcore.apply(nn.Sequential(nn.Linear(8, 8)), "adapter", target_modules=["0"], use_gating=True)
    with pytest.raises(peftcore.PeftcoreError, match=r"use_gating averages .* found \[3, 8\]"):
        model(torch.randn(3, 8))


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    peftcore.apply(model, "adapter", target_modules=["0"], bottleneck_size=4, dropout=0.5)
    disturb(model, "default", seed=1)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


def test_names_and_config_on_disk(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file

    model = peftcore.apply(tiny.llama(), "adapter", placement="pfeiffer", bottleneck_size=4, layers_to_transform=[1])
    peftcore.save(model, tmp_path)
    place = "base_model.model.model.layers.1.mlp"
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == [
        f"{place}.adapter_{half}.{kind}" for half in ("down", "up") for kind in ("bias", "weight")
    ]
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["bottleneck_size"], fields["layers_to_transform"]) == (
        "BOTTLENECK_ADAPTER",
        4,
        [1],
    )


def test_a_mixture_with_lora_is_saved_loaded_and_switched(tmp_path: Path) -> None:
    """LoRA on attention and a bottleneck on the feed-forward, as one composition."""

    def lora(model: nn.Module, name: str) -> None:
        torch.manual_seed(1)
        peftcore.apply(model, "lora", adapter=name, r=2, target_modules=["q_proj", "v_proj"])

    alone: dict[str, Tensor] = {}
    for name, add in (
        ("a", lambda model: lora(model, "a")),
        ("b", lambda model: peftcore.apply(model, "adapter", adapter="b", placement="pfeiffer", bottleneck_size=4)),
    ):
        model = tiny.llama()
        torch.manual_seed(1)
        add(model)
        disturb(model, name, seed=3)
        alone[name] = tiny.logits(model)

    model = tiny.llama()
    base = tiny.logits(model)
    lora(model, "a")
    torch.manual_seed(1)
    peftcore.apply(model, "adapter", adapter="b", placement="pfeiffer", bottleneck_size=4)
    for name in "ab":
        disturb(model, name, seed=3)
    both = tiny.logits(model)
    assert (both - alone["a"]).abs().max() > 1e-3 and (both - alone["b"]).abs().max() > 1e-3
    model(**tiny.inputs(model)).logits.square().mean().backward()
    assert all(p.grad is not None for name in "ab" for _, p in adapter_parameters(model, name))

    twin = tiny.llama()
    for name in "ab":
        peftcore.save(model, tmp_path / name, adapter=name)
        peftcore.load(twin, tmp_path / name, adapter=name)
    assert torch.equal(tiny.logits(twin), both)
    for names, expected in ((["a"], alone["a"]), (["b"], alone["b"]), (["a", "b"], both), ([], base)):
        peftcore.activate(twin, names)
        assert torch.equal(tiny.logits(twin), expected), names
    peftcore.remove(twin, "a")
    peftcore.remove(twin, "b")
    assert torch.equal(tiny.logits(twin), base)


def test_merging_says_that_it_cannot_and_what_can() -> None:
    model = peftcore.apply(tiny.llama(), "adapter", bottleneck_size=4)
    with pytest.raises(peftcore.PeftcoreError, match=r"'default' \(adapter\) cannot be merged.*No active adapter can"):
        peftcore.merge(model, undo=True)
    peftcore.apply(model, "lora", adapter="low-rank", r=2)
    with pytest.raises(
        peftcore.PeftcoreError,
        match=r"To merge only the others \(low-rank "
        r"\(lora\)\).*\['low-rank'\]\)",
    ):
        peftcore.merge(model, undo=True)
    peftcore.activate(model, ["low-rank"])
    peftcore.merge(model, undo=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bottleneck_size": 33}, r"bottleneck_size=33 is wider than 'model.layers.0.self_attn' \(32\)"),
        ({"bottleneck_size": 0}, "must be a positive whole number, found 0"),
        ({"reduction_factor": 0.5}, "reduction_factor must be at least 1, found 0.5"),
        ({"non_linearity": "rellu"}, "non_linearity must be 'relu', .* or 'linear', found 'rellu' .nearest: 'relu'"),
        (
            {"placement": "pfeifer"},
            "must be 'houlsby', 'pfeiffer' or 'attention', found 'pfeifer' .nearest: 'pfeiffer'",
        ),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
        ({"scaling": math.nan}, "scaling must be a finite number or .learned. or .channel., found nan"),
        ({"is_parallel": True, "original_ln_before": True}, "cannot be combined"),
        ({"original_ln_before": True}, "no module of LlamaForCausalLM returns the sum with the residual"),
        ({"target_modules": ["mlpp"]}, "'mlpp' matches no module"),
        ({"target_modules": ["mlp"], "original_ln_before": True}, "select known sublayers"),
        ({"exclude_modules": ["mlp"]}, "need target_modules"),
        ({"layers_to_transform": [0, 7]}, r"the model has no layers \[7\] \(layers: \[0, 1\]\)"),
        ({"layers_to_transform": []}, "names no layer"),
        ({"original_ln_after": False}, "go together, with original_ln_before=True .AdapterPlus.*"),
        ({"phm_layer": True, "bottleneck_size": 6}, "phm_dim=4 does not divide the width 6 of a projection 32 -> 6"),
        ({"factorized_phm_W": False, "phm_rank": 2}, "phm_rank=2 needs factorized_phm_W=True"),
        ({"reduction": 4}, "no field 'reduction' .nearest: 'reduction_factor'"),
    ],
)
def test_wrong_configs(fields: dict[str, Any], message: str) -> None:
    model = tiny.llama()
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(model, "adapter", **fields)
    assert peftcore.engine.state_of(model) is None


def test_a_model_that_is_not_known() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 2)))
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot detect .*target_modules=.*linear layers are: 0, 2.0"):
        peftcore.apply(model, "adapter")
    with pytest.raises(peftcore.PeftcoreError, match=r"the width of '2' \(Sequential\) is unknown"):
        peftcore.apply(model, "adapter", target_modules=["2"])
    peftcore.apply(model, "adapter", target_modules="0", bottleneck_size=6)
    assert applied(model, "default").paths == ("0",)
