"""Hugging Face PEFT loads adapters saved here, and vice versa; places; invalid configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.against_peft import TASKS, both_ways, logits, moved, quiet
from support.whole_run import nightly_but
from torch import nn

import peftcore
from peftcore.files.loading import restore
from peftcore.plugin import disturb

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smallest": {"select_top": False, "sparsity": 0.95},
    "all": {"sparsity": 0.0},
    "supra": {"r": 3},
    "supra, scaled": {"r": 3, "lora_alpha": 9.0, "lora_dropout": 0.5},
    "drawn": {"init_weights": False, "r": 2},
}


@pytest.mark.parametrize("kind", nightly_but(TARGETS, ["llama"]))
@pytest.mark.parametrize("case", list(CASES))
def test_files(case: str, kind: str, tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], "sparsity": 0.9, **CASES[case]}
    torch.manual_seed(0)
    config = quiet(peft.SupertuningConfig, task_type=TASKS[kind], **fields)
    model = peftcore.apply(make(), "supertuning", **fields)
    both_ways(make, tmp_path, model, config)


@pytest.mark.parametrize("case", ["plain", "smallest", "supra", "drawn"])
def test_it_starts_as_peft_s(case: str, tmp_path: Path) -> None:
    """The same places, and numbers of the same width."""
    fields = {"target_modules": TARGETS["llama"], "sparsity": 0.9, **CASES[case]}
    torch.manual_seed(0)
    config = peft.SupertuningConfig(task_type="CAUSAL_LM", **fields)
    expected = peft.get_peft_model_state_dict(quiet(peft.get_peft_model, tiny.llama(), config))
    folder = peftcore.save(peftcore.apply(tiny.llama(), "supertuning", **fields), tmp_path)
    actual = load_file(folder / "adapter_model.safetensors")
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        if name.endswith("indices"):
            assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype
        else:
            assert float(tensor.std()) == pytest.approx(float(expected[name].std()), rel=0.4)


def test_places_are_those_of_the_largest_numbers(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "supertuning", sparsity=0.98, target_modules=["up_proj"])
    layer = model.model.layers[1].mlp.up_proj
    at = layer.peftcore["default"].supertuning_indices.long()
    size = layer.weight.detach().abs().flatten()
    assert len(at) == int(size.numel() * 0.02) and size[at].min() >= size.sort(descending=True)[0][len(at) - 1]


def test_a_file_of_peft_without_places(tmp_path: Path) -> None:
    """They are computed from a dense base; a 4-bit base refuses the file until it is saved with them."""
    fields = {"sparsity": 0.9, "target_modules": ["v_proj"], "save_precomputed_indices": False}
    config = quiet(peft.SupertuningConfig, task_type="CAUSAL_LM", **fields)
    peft_model = moved(quiet(peft.get_peft_model, tiny.llama(), config).eval())
    quiet(peft_model.save_pretrained, tmp_path / "peft")
    assert not any("indices" in name for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    dense = peftcore.load(tiny.llama(), tmp_path / "peft")
    torch.testing.assert_close(tiny.logits(dense), logits(peft_model), rtol=0, atol=1e-5)
    quantized = peftcore.quantize(tiny.llama(), "nf4")
    with pytest.raises(peftcore.PeftcoreError, match=r"dense weight of 'model\..*v_proj', but this model .* in nf4"):
        peftcore.load(quantized, tmp_path / "peft")
    peftcore.load(quantized, peftcore.save(dense, tmp_path / "peftcore"))


@pytest.mark.parametrize(
    "make", [lambda: tiny.llama().bfloat16(), lambda: peftcore.quantize(tiny.llama(), "nf4")], ids=["bf16", "nf4"]
)
def test_places_are_saved(make: Any, tmp_path: Path) -> None:
    """In a rounded weight other numbers are the largest; also for an adapter that takes the file's values."""
    trained = peftcore.apply(tiny.llama(), "supertuning", sparsity=0.9)
    disturb(trained, "default", seed=1)
    peftcore.save(trained, tmp_path)
    expected = tiny.logits(trained) - tiny.logits(tiny.llama())

    def compare(model: nn.Module) -> None:
        change = tiny.logits(model).float() - tiny.logits(make()).float()
        assert (change - expected).norm() < 0.2 * expected.norm()

    compare(peftcore.load(make(), tmp_path))
    for replace in (restore, lambda model, folder: peftcore.set_state_dict(model, "default", folder)):
        applied = peftcore.apply(make(), "supertuning", sparsity=0.9)
        replace(applied, tmp_path)
        compare(applied)


def test_what_does_not_fit_is_refused() -> None:
    def refused(match: str, make: Any = tiny.llama, **fields: Any) -> None:
        with pytest.raises(peftcore.PeftcoreError, match=match):
            peftcore.apply(make(), "supertuning", **fields)

    refused(r"must be in \[0, 1\), found 1.0", sparsity=1.0)
    refused("leaves none of the 1024 numbers of 'model", sparsity=0.9999)
    refused("lora_alpha needs a LoRA", lora_alpha=4.0)
    refused(r"'0' matches Conv2d .* which this method cannot adapt", tiny.convnet, target_modules=["0"])


def test_small_numbers_act_in_mixed_precision() -> None:
    """In bf16 1 + 0.001 is 1, so the numbers are not added to the weight there."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.ones_(model[0].weight)
    peftcore.apply(model, "supertuning", sparsity=0.6, target_modules=["0"])
    adapter = model[0].peftcore["default"]
    nn.init.constant_(adapter.supertuning_values, 1e-3)
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = model(x)
    expected = x @ adapter.with_sparse(torch.zeros(4, 4)).detach().T
    assert expected.abs().max() >= 1e-3
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-6)
