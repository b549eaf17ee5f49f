"""Hugging Face PEFT reads what is saved here, and the other way round; a base in 4 bits; what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import both_ways, quiet, same_start

import peftcore
from peftcore.plugin import disturb

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", {"r": 4, "psoft_alpha": 6}),
     ("llama", {"r": 4, "psoft_svd": "lowrank", "random_seed": 5, "ab_svd_init": "pissa_init"}),
     ("bert", {"r": 5, "use_cayley_neumann": True, "cayley_neumann_eps": 0.4, "psoft_mag_a": False}),
     ("t5", {"r": 4, "psoft_orth": False, "psoft_mag_b": False}),
     ("t5", {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 4, "init_weights": False})],
)  # fmt: skip
def test_files(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], **more}
    config = quiet(peft.PsoftConfig, task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "psoft", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "psoft", **fields), config)


def test_the_subspace_is_made_again_from_the_same_base(tmp_path: Path) -> None:
    """Beside another adapter that has changed the weight, too."""
    model = peftcore.apply(tiny.llama(), "lora", adapter="first", r=2)
    disturb(model, "first", seed=2)
    peftcore.apply(model, "psoft", r=4)
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path, adapter="default")
    layer = [m.model.layers[1].mlp.up_proj.peftcore["default"] for m in (model, peftcore.load(tiny.llama(), tmp_path))]
    assert torch.equal(layer[0].a, layer[1].a) and torch.equal(layer[0].b, layer[1].b)


def test_what_has_no_meaning_is_refused() -> None:
    for fields, message in (
        ({"r": 17}, "r=17 is above a size of 'model"),
        ({"cayley_neumann_eps": 1.0}, "cayley_neumann_eps must be between 0 and 1, found 1.0"),
        ({"num_cayley_neumann_terms": 1}, "rotates nothing. Use 2 or more"),
        ({"psoft_alpha": 0}, "psoft_alpha must be above 0, found 0"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=message):
            peftcore.apply(tiny.llama(), "psoft", **fields)


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"'0' matches Conv2d .* which this method cannot adapt"):
        peftcore.apply(tiny.convnet(), "psoft", target_modules=["0"])


def test_a_file_of_a_4_bit_base_is_refused_on_the_dense_one(tmp_path: Path) -> None:
    """The rotation's factors are computed from W, which rounding to 4 bits changes."""
    trained = peftcore.quantize(tiny.llama(), "nf4")
    peftcore.apply(trained, "psoft", r=4, target_modules=TARGETS["llama"])
    disturb(trained, "default", seed=1)
    peftcore.save(trained, tmp_path / "adapter")
    again = peftcore.load(peftcore.quantize(tiny.llama(), "nf4"), tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), tiny.logits(trained))
    with pytest.raises(
        peftcore.PeftcoreError, match=r"k_proj' in 'nf4 of .*, and here it is in 'dense'\. psoft computes"
    ):
        peftcore.load(tiny.llama(), tmp_path / "adapter")
    peftcore.load(tiny.llama(), tmp_path / "adapter", check_base=False)
