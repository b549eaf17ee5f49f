"""Hugging Face PEFT loads adapters saved here, and vice versa; a base in 4 bits; invalid configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.against_peft import both_ways, quiet
from torch import nn

import peftcore
from peftcore.files.loading import restore
from peftcore.plugin import disturb

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TENSORS = "adapter_model.safetensors"
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"r": 4, "psoft_alpha": 6}),
     ("llama", {"r": 4, "psoft_svd": "lowrank", "random_seed": 5, "ab_svd_init": "pissa_init"}),
     ("bert", {"r": 5, "use_cayley_neumann": True, "cayley_neumann_eps": 0.4, "psoft_mag_a": False}),
     ("t5", {"r": 4, "psoft_orth": False, "psoft_mag_b": False}),
     ("t5", {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 4, "init_weights": False})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], **options}
    config = quiet(peft.PsoftConfig, task_type=TASKS[kind], **fields)
    start = load_file(peftcore.save(peftcore.apply(make(), "psoft", **fields), tmp_path / "start") / TENSORS)
    expected = peft.get_peft_model_state_dict(quiet(peft.get_peft_model, make(), config))
    assert {n: t.shape for n, t in start.items() if not n.endswith((".psoft_A", ".psoft_B"))} == {
        n: t.shape for n, t in expected.items()
    }
    both_ways(make, tmp_path, peftcore.apply(make(), "psoft", **fields), config)


def test_factors_are_saved(tmp_path: Path) -> None:
    """Also beside another adapter that has changed the weight."""
    model = peftcore.apply(tiny.llama(), "lora", adapter="first", r=2)
    disturb(model, "first", seed=2)
    peftcore.apply(model, "psoft", r=4)
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path, adapter="default")
    trained, loaded = (
        m.model.layers[1].mlp.up_proj.peftcore["default"] for m in (model, peftcore.load(tiny.llama(), tmp_path))
    )
    assert torch.equal(trained.psoft_A, loaded.psoft_A) and torch.equal(trained.psoft_B, loaded.psoft_B)


def test_what_has_no_meaning_is_refused() -> None:
    for fields, message in (
        ({"r": 17}, "r=17 is above a size of 'model"),
        ({"cayley_neumann_eps": 1.0}, "cayley_neumann_eps must be between 0 and 1, found 1.0"),
        ({"num_cayley_neumann_terms": 1}, "rotates nothing. Use 2 or more"),
        ({"psoft_alpha": 0}, "psoft_alpha must be positive, found 0"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=message):
            peftcore.apply(tiny.llama(), "psoft", **fields)


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"'0' matches Conv2d .* which this method cannot adapt"):
        peftcore.apply(tiny.convnet(), "psoft", target_modules=["0"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_a_4_bit_base_keeps_its_factors_on_dense_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    """Loaded, restored and set: singular vectors of the dense weight would make another adapter of the rotation."""
    trained = peftcore.quantize(tiny.llama(), "nf4")
    peftcore.apply(trained, "psoft", r=4, target_modules=TARGETS["llama"])
    disturb(trained, "default", seed=1)
    peftcore.save(trained, tmp_path)
    expected = tiny.logits(trained) - tiny.logits(peftcore.quantize(tiny.llama(), "nf4"))

    def compare(model: nn.Module) -> None:
        change = tiny.logits(model).float() - tiny.logits(tiny.llama().to(dtype)).float()
        assert (change - expected).norm() < 0.2 * expected.norm()

    compare(peftcore.load(tiny.llama().to(dtype), tmp_path))
    for replace in (restore, lambda model, folder: peftcore.set_state_dict(model, "default", folder)):
        applied = peftcore.apply(tiny.llama().to(dtype), "psoft", r=4, target_modules=TARGETS["llama"])
        replace(applied, tmp_path)
        compare(applied)


def test_a_file_of_peft_is_refused_on_a_4_bit_base(tmp_path: Path) -> None:
    """It lacks the factors, which PEFT computed from the dense weight."""
    config = peft.PsoftConfig(task_type="CAUSAL_LM", r=4, target_modules=["v_proj"])
    quiet(quiet(peft.get_peft_model, tiny.llama(), config).save_pretrained, tmp_path / "peft")
    quantized = peftcore.quantize(tiny.llama(), "nf4")
    with pytest.raises(peftcore.PeftcoreError, match=r"dense weight of 'model\..*v_proj', but this model .* in nf4"):
        peftcore.load(quantized, tmp_path / "peft")
    dense = peftcore.load(tiny.llama(), tmp_path / "peft")
    peftcore.load(quantized, peftcore.save(dense, tmp_path / "peftcore"))
