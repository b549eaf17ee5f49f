"""`trainable_token_indices`: rows beside LoRA, tied or apart, beside PEFT both ways; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import both_ways, logits

import peftcore

IDS, OTHER = [60, 3, 5], [41, 5]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"trainable_token_indices": IDS, "target_modules": ["q_proj"]}),
    "alone": ("llama", {"trainable_token_indices": IDS, "target_modules": []}),
    "a head that is not tied": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": OTHER}, "target_modules": ["q_proj"]},
    ),
    "gpt2": ("gpt2", {"trainable_token_indices": IDS, "target_modules": ["c_attn"]}),
    "t5": ("t5", {"trainable_token_indices": IDS, "target_modules": ["q"]}),
    "both alike": (
        "gpt2",
        {
            "trainable_token_indices": {"wte": IDS, "lm_head": IDS},
            "target_modules": ["c_attn"],
            "ensure_weight_tying": True,
        },
    ),
    "apart": (
        "gpt2",
        {
            "trainable_token_indices": {"wte": IDS, "lm_head": OTHER},
            "target_modules": ["c_attn"],
            "ensure_weight_tying": False,
        },
    ),
    "the head alone": ("gpt2", {"trainable_token_indices": {"lm_head": OTHER}, "target_modules": ["c_attn"]}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_against_peft_and_merged(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    if case == "alone":  # of which PEFT makes no adapter
        model = peftcore.apply(tiny.MODELS[kind](), "lora", **fields)
        assert [path for path, _ in peftcore.engine.adapter_modules(model, "default")] == ["model.embed_tokens"]
        return
    ours = peftcore.apply(tiny.MODELS[kind](), "lora", r=2, **fields)
    task = peftcore.model.detect(ours).task_type
    both_ways(tiny.MODELS[kind], tmp_path, ours, peft.LoraConfig(task_type=task, r=2, **fields))
    acting = logits(ours)
    if case in ("apart", "the head alone"):
        with pytest.raises(peftcore.PeftcoreError, match=r"tied to .*untie=True"):
            peftcore.merge(ours, undo=True)
        return
    peftcore.merge(ours, undo=True)
    torch.testing.assert_close(logits(ours), acting, rtol=0, atol=1e-5)
    peftcore.unmerge(ours)
    assert torch.equal(logits(ours), acting)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_token_indices": [96]}, r"has 96 rows, so no row for token 96"),
        ({"trainable_token_indices": {"wpe_": [3]}}, r"'wpe_' is not an embedding or head \(nearest"),
        (
            {"trainable_token_indices": {"wte": IDS, "lm_head": OTHER}},
            r"names different rows of 'lm_head'.*tying=False",
        ),
        ({"trainable_token_indices": IDS, "modules_to_save": ["wte"]}, r"'transformer.wte' is trained in full"),
        (
            {"trainable_token_indices": IDS, "target_modules": ["wte"]},
            r"'transformer.wte' is selected by target_modules",
        ),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(tiny.gpt2(), "lora", **{"target_modules": ["c_attn"], **fields})


@pytest.mark.parametrize("together", [True, False])
def test_a_head_that_peft_ties_to_an_adapted_embedding(together: bool, tmp_path: Path) -> None:
    """With ensure_weight_tying its files forget the head in target_modules; its tensors are there."""
    fields: dict[str, Any] = {"target_modules": ["c_attn", "wte", "lm_head"], "ensure_weight_tying": together}
    model = peftcore.apply(tiny.gpt2(), "lora", r=2, **fields)
    both_ways(tiny.gpt2, tmp_path, model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **fields))
