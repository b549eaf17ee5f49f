"""Values of an adapter taken out and exchanged: what `load` computes, in place, not compiled again, all or nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from support import tiny
from support.against_peft import quiet
from support.composed_models import Images, output
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters, applied, state_of
from peftcore.testing import disturb

LINEAR = ["q_proj", "down_proj"]
EMBEDDING, ATTENTION = {"target_modules": ["embed_tokens"]}, {"target_modules": ["c_attn"]}


def adapted(method: str = "lora", make: Any = tiny.llama, seed: int = 1, **fields: Any) -> nn.Module:
    if method == "lora":
        fields = {"r": 4, "target_modules": LINEAR, **fields}
    model = quiet(peftcore.apply, make(), method, adapter="a", **fields)
    disturb(model, "a", seed=seed)
    return model


# What stands, and what is swapped into it.
CASES: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "same": ("lora", tiny.llama, {}, {}),
    "scale": ("lora", tiny.llama, {"lora_alpha": 3}, {"lora_alpha": 16, "use_rslora": True}),
    "rank": ("lora", tiny.llama, {"r": 6, "lora_alpha": 3}, {"r": 2, "lora_alpha": 16}),
    "patterns": ("lora", tiny.llama, {"r": 6}, {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"layers.1.*": 3}}),
    "fewer": ("lora", tiny.llama, {"lora_alpha": 3}, {"target_modules": ["down_proj"], "layers_to_transform": [1]}),
    "dropout": ("lora", tiny.llama, {"lora_dropout": 0.5}, {"lora_dropout": 0.0}),
    "embedding": ("lora", tiny.llama, EMBEDDING, {**EMBEDDING, "r": 2}),
    "gpt2": ("lora", tiny.gpt2, ATTENTION, {**ATTENTION, "r": 3, "lora_alpha": 5}),
    "conv": ("lora", Images, {"target_modules": ["one", "head"]}, {"target_modules": ["one"], "r": 3}),
    "head": ("lora", tiny.llama, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    "prompt": ("prompt-tuning", tiny.llama, {"num_virtual_tokens": 3}, {"num_virtual_tokens": 3}),
    "bitfit": ("bitfit", tiny.gpt2, {}, {}),
    "ia3": ("ia3", tiny.llama, {"target_modules": LINEAR}, {"target_modules": LINEAR[::-1]}),
}


@pytest.mark.parametrize("kind", ["folder", "state_dict"])
@pytest.mark.parametrize("case", list(CASES))
def test_it_computes_what_load_does(case: str, kind: str, tmp_path: Path) -> None:
    method, make, here, there = CASES[case]
    other = adapted(method, make, seed=2, **there)
    wanted = output(other)
    model = adapted(method, make, seed=1, **here)
    parameters = dict(adapter_parameters(model, "a"))
    source: Any = tmp_path
    if kind == "folder":
        quiet(peftcore.save, other, tmp_path)
    else:
        source = peftcore.state_dict(other, "a")
    assert (output(model) - wanted).abs().max() > 1e-3
    assert peftcore.set_state_dict(model, "a", source) is model
    exact = case in ("same", "head", "prompt", "bitfit", "ia3")
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=0 if exact else 5e-6)
    assert all(parameter is parameters[name] for name, parameter in adapter_parameters(model, "a"))
    again = quiet(peftcore.load, make(), quiet(peftcore.save, model, tmp_path / "again"))
    assert torch.equal(output(again), output(model))


def test_it_takes_the_folders_of_peft(tmp_path: Path) -> None:
    theirs = quiet(
        peft.get_peft_model,
        tiny.llama(),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False),
    ).eval()
    quiet(theirs.save_pretrained, tmp_path)
    model = peftcore.set_state_dict(adapted(r=8), "a", tmp_path)
    torch.testing.assert_close(output(model), output(theirs), rtol=0, atol=1e-5)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    same = adapted(r=3, lora_alpha=5, target_modules=["q_proj"])
    torch.testing.assert_close(output(peftcore.set_state_dict(same, "a", tensors)), output(theirs), rtol=0, atol=1e-5)
    with pytest.raises(
        peftcore.CheckpointError,
        match=r"has shape \[3, 32\], but the applied adapter has \[4, 32\].* values with a config",
    ):
        peftcore.set_state_dict(adapted(target_modules=["q_proj"]), "a", tensors)


def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    both: dict[str, Any] = {"make": Images, "target_modules": ["one", "two", "head"]}
    changes: list[dict[str, Any]] = [{}, {"lora_alpha": 3, "r": 2}, {"target_modules": ["head"]}]
    folders = [
        peftcore.save(adapted(seed=seed + 2, **{**both, **each}), tmp_path / str(seed))
        for seed, each in enumerate(changes)
    ]
    wanted = [output(peftcore.load(Images(), folder)) for folder in folders]
    model = adapted(**both)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(tiny.IMAGES)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for folder, found in zip(folders, wanted, strict=True):
                peftcore.set_state_dict(model, "a", folder)
                torch.testing.assert_close(compiled(tiny.IMAGES), found, rtol=0, atol=5e-6)
            peftcore.scale(model, "a", 0.5)
            with pytest.raises(torch._dynamo.exc.RecompileError):  # so the check is one
                compiled(tiny.IMAGES)
    torch._dynamo.reset()


@pytest.mark.parametrize("start", [True, "pissa"])
def test_a_state_is_that_of_a_file_a_copy_and_safe_to_load(start: bool | str, tmp_path: Path) -> None:
    model = adapted(init_lora_weights=start)
    state = peftcore.state_dict(model, "a")
    peftcore.save(model, tmp_path)
    file = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert state.keys() == file.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in file.items())
    wanted = output(model)
    disturb(model, "a", seed=5)
    assert torch.equal(
        state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
        file["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
    )
    kept = io.BytesIO()
    torch.save(state, kept)
    kept.seek(0)
    assert torch.equal(output(peftcore.set_state_dict(model, "a", torch.load(kept, weights_only=True))), wanted)


def test_a_state_knows_its_scale_and_rank() -> None:
    other = adapted(seed=3, r=6, lora_alpha=1)
    model = adapted()
    found = output(peftcore.set_state_dict(other, "a", peftcore.state_dict(model, "a")))
    torch.testing.assert_close(found, output(model), rtol=0, atol=5e-6)


def test_factors_of_either_side_are_worked_in(tmp_path: Path) -> None:
    other = peftcore.scale(adapted(seed=2), "a", 0.3)
    wanted = output(other)
    peftcore.save(other, tmp_path)
    for source in (tmp_path, peftcore.state_dict(other, "a")):
        model = peftcore.scale(adapted(), "a", 0.0)
        peftcore.set_state_dict(model, "a", source)
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=5e-6)
        assert applied(model, "a").multiplier == 1


def test_it_rests_acts_and_is_given_to_samples_as_before(tmp_path: Path) -> None:
    wanted, base = output(adapted(seed=2)), output(tiny.llama())
    peftcore.save(adapted(seed=2), tmp_path)
    model = adapted()
    peftcore.activate(model, [])
    peftcore.set_state_dict(model, "a", tmp_path)
    assert torch.equal(output(model), base)
    peftcore.activate(model, ["a", None], per_sample=True)
    peftcore.set_state_dict(model, "a", peftcore.state_dict(adapted(seed=2), "a"))
    torch.testing.assert_close(output(model)[0], wanted[0], rtol=0, atol=1e-6)
    assert state_of(model).samples == ("a", None)
    merged = peftcore.merge(adapted(), undo=True)
    with pytest.raises(peftcore.PeftcoreError, match="cannot set the values of 'a': adapters are merged"):
        peftcore.set_state_dict(merged, "a", tmp_path)


def nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * float("nan") for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"r": 6},
            r"has rank 6 at '.*q_proj.lora_A.weight', but the applied adapter has 4.* Apply it with r=6 or more before",
        ),
        ({"target_modules": [*LINEAR, "v_proj"]}, r"it changes 'model.layers.0.self_attn.v_proj', but 'a' does not"),
        ({"modules_to_save": ["lm_head"]}, r"it changes 'lm_head.weight', but 'a' does not"),
        ({"lora_bias": True}, "it differs at 'model.layers.0.self_attn.q_proj': tensors"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_and_nothing_changes(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    peftcore.save(adapted(seed=2, **fields), tmp_path)
    model = peftcore.scale(adapted(), "a", 0.5)
    before = output(model)
    with pytest.raises(peftcore.CheckpointError, match=message):
        peftcore.set_state_dict(model, "a", tmp_path)
    assert torch.equal(output(model), before)


def test_other_methods_bases_and_damaged_values_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = adapted()
    before = output(model)
    state = peftcore.state_dict(adapted(seed=2), "a")
    last = next(reversed(state))
    prompt = peftcore.state_dict(adapted("prompt-tuning", num_virtual_tokens=2), "a")
    other = tiny.llama()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    peftcore.save(adapted(make=lambda: other, seed=2), tmp_path)
    cases: list[tuple[Any, str]] = [
        (
            prompt,
            r"is an adapter of method prompt-tuning, but 'a' uses lora. Load it under another name \(peftcore.load\(",
        ),
        ({**state, last: state[last] * float("nan")}, "not finite"),
        ({name: tensor for name, tensor in state.items() if name != last}, "1 tensors are missing"),
        ({**state, "more": state[last]}, "1 tensors are unexpected, such as 'more'"),
        (
            tmp_path,
            r"was trained on another base: .*embed_tokens.*peftcore\.set_state_dict\(model, 'a', \.\.\., "
            r"check_base=False",
        ),
        (tmp_path / "none", "none"),
    ]
    for source, message in cases:
        with pytest.raises(peftcore.CheckpointError, match=message):
            peftcore.set_state_dict(model, "a", source)
        assert torch.equal(output(model), before)
    peftcore.set_state_dict(model, "a", tmp_path, check_base=False)
    assert not torch.equal(output(model), before)


def test_configs_that_compute_otherwise_are_refused() -> None:
    model = adapted("adapter", non_linearity="relu", reduction_factor=4)
    other = adapted("adapter", non_linearity="gelu", reduction_factor=4)
    with pytest.raises(peftcore.CheckpointError, match=r"it differs at '.*': .*under another name: peftcore\.load"):
        peftcore.set_state_dict(model, "a", peftcore.state_dict(other, "a"))


@pytest.mark.parametrize(
    ("method", "fields", "other"),
    [
        ("vera", {"r": 8, "save_projection": False}, {"projection_prng_key": 5}),
        ("fourierft", {"n_frequency": 20}, {"random_loc_seed": 5}),
        ("trainable-tokens", {"token_indices": [3, 4]}, {"token_indices": [4, 5]}),
    ],
)
def test_what_follows_from_a_config_and_is_in_no_file_is_compared(
    method: str, fields: dict[str, Any], other: dict[str, Any]
) -> None:
    model, state = adapted(method, **fields), peftcore.state_dict(adapted(method, **{**fields, **other}), "a")
    before = torch.random.get_rng_state()
    with pytest.raises(peftcore.CheckpointError, match=r"it differs at '.*': other values of the non-persistent"):
        peftcore.set_state_dict(model, "a", state)
    assert torch.equal(torch.random.get_rng_state(), before)
    same = adapted(method, seed=3, **fields)
    peftcore.set_state_dict(model, "a", peftcore.state_dict(same, "a"))
    assert torch.equal(output(model), output(same))
