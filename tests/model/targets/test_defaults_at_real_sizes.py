"""Default fields work on models of real sizes: what a method cannot adapt is left out, and reported."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import transformers
from support import tiny
from torch import nn

import peftcore
from peftcore.engine import applied
from peftcore.model import targets


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


def moe() -> nn.Module:
    """Return a Qwen2-MoE of the default widths, whose shared expert has a gate of one row."""
    with torch.device("meta"):
        config = transformers.Qwen2MoeConfig(num_hidden_layers=1, num_experts=4, vocab_size=256)
        return transformers.Qwen2MoeForCausalLM(config)


def siglip(**size: int) -> nn.Module:
    parts = {f"{part}_config": {"num_hidden_layers": 1, **size} for part in ("text", "vision")}
    return transformers.SiglipModel(transformers.SiglipConfig(**parts))


GATE = "model.layers.0.mlp.shared_expert_gate"
WITHOUT_GATE = {
    "c3a": "block_size=256 must divide both sizes",
    "gralora": "gralora_k=2 must divide",
    "psoft": "r=32 is above a size",
    "road": "group_size=64 does not divide the 1 outputs",
    "shira": "r=32 needs 65568 entries",
    "vblora": "vector_length=256 must divide",
    "waveft": "n_frequency=2592 is too large",
}


@pytest.mark.parametrize("method", WITHOUT_GATE)
def test_a_gate_of_one_row_is_left_out_and_reported(method: str) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        plan = peftcore.plan(moe(), method)
    said = [str(warning.message) for warning in found if "which do not fit" in str(warning.message)]
    assert len(said) == 1 and WITHOUT_GATE[method] in said[0]
    assert said[0].startswith(f"target_modules='all-linear' leaves out 1 layers ('{GATE}'), 0.004 % of the weight")
    assert plan.coverage.left_out["linear layers not selected"] == 2048 + 4 * 2048  # and the router
    with pytest.raises(peftcore.PeftcoreError, match=f"(?s){WITHOUT_GATE[method]}.*"):
        peftcore.plan(moe(), method, target_modules=["shared_expert_gate"])


def test_much_that_does_not_fit_is_an_error() -> None:
    @dataclass(frozen=True)
    class Config(targets.LayersConfig):
        odd: str = "down_proj"

        def misfit(self, path: str, module: nn.Module) -> str | None:
            return f"'{path}' is odd" if path.endswith(self.odd) else None

    model = tiny.llama()
    architecture = peftcore.model.detect(model)
    with pytest.raises(peftcore.PeftcoreError, match=r"^'model.layers.0.mlp.down_proj' is odd$"):
        Config().selected(model, architecture)
    with pytest.raises(peftcore.PeftcoreError, match=r"^'model.layers.0.mlp.down_proj' is odd$"):
        Config(target_modules=["q_proj", "down_proj"]).selected(model, architecture)
    with pytest.warns(UserWarning, match=r"leaves out 1 layers \('model.layers.0.self_attn.k_proj'\), \d.* 'model"):
        chosen = Config(odd="layers.0.self_attn.k_proj").selected(model, architecture)
    assert "model.layers.0.self_attn.k_proj" not in chosen and len(chosen) == 13


def test_attention_that_a_method_cannot_adapt_as_a_whole_is_left_out() -> None:
    """SigLIP's head has `nn.MultiheadAttention`: LoRA adapts it, for other methods `all-linear` is the rest."""
    with torch.device("meta"):
        model = siglip()
    for method in ("oft", "ia3", "vera", "c3a", "dora", "miss", "fourierft"):
        left = peftcore.plan(model, method).coverage.left_out
        assert left["linear layers that are read without being called"] == 768 * 768, method
    with pytest.raises(peftcore.PeftcoreError, match=r"'vision_model\.head.attention.out_proj' would have no effect"):
        peftcore.plan(model, "oft", target_modules=["head.attention.out_proj"])


def llama(hidden: int, intermediate: int, heads: int, key_value_heads: int) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ((896, 4864, 14, 2), 128),  # Qwen2.5-0.5B
        ((576, 1536, 9, 3), 64),  # SmolLM2-135M
        ((4096, 14336, 32, 8), 256),  # Llama-3.1-8B: the default
    ],
)
def test_vectors_of_vblora_divide_sizes_that_256_does_not(sizes: tuple[int, int, int, int], length: int) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = peftcore.apply(llama(*sizes), "vblora")
    messages = [str(warning.message) for warning in found]
    replaced = f"vector_length=256 does not divide the sizes of all layers; vector_length={length} is used instead"
    assert messages == ([replaced] if length < 256 else [])
    assert peftcore.engine.applied(model, "default").config.vector_length == length
    names = dict(peftcore.engine.adapter_parameters(model, "default"))
    assert [p.shape[1] for name, p in names.items() if name.endswith("vector_bank")][:1] == [length]


def test_vblora_names_a_length_for_layers_that_were_named() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"q_proj': \(896, 896\)\. Choose 128, or exclude the layer"):
        peftcore.plan(llama(896, 4864, 14, 2), "vblora", target_modules=["q_proj", "k_proj"])
    peftcore.plan(llama(896, 4864, 14, 2), "vblora", target_modules=["q_proj", "k_proj"], vector_length=128)


def test_blocks_of_c3a_divide_sizes_that_256_does_not() -> None:
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=1, num_attention_heads=3, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.warns(UserWarning, match=r"block_size=256 does not divide .*block_size_pattern=\{'down_proj': 32, "):
        peftcore.apply(model, "c3a")
    found = applied(model, "default").config
    assert found.block_size == 256 and found.block_size_pattern["q_proj"] == 32
    kernel = dict(peftcore.engine.adapter_parameters(model, "default"))
    assert sorted(tuple(p.shape) for p in kernel.values()) == [(3, 3, 32)] * 4 + [(3, 8, 32)] + [(8, 3, 32)] * 2
    with pytest.raises(peftcore.PeftcoreError, match=r"block_size=256 must divide both sizes, .*: choose 96"):
        peftcore.plan(model, "c3a", target_modules=["q_proj"])
