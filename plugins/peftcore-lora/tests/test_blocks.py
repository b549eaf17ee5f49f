"""BD-LoRA: block-diagonal factors are trained as such, PEFT's files both ways, merged, written whole, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.against_peft import both_ways, quiet, same_start
from torch import nn

import peftcore
from peftcore.plugin import disturb

BLOCKS: dict[str, Any] = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "o_proj"]}


def adapted(**more: Any) -> nn.Module:
    return peftcore.apply(tiny.llama(), "lora", **{**FIELDS, "use_bdlora": BLOCKS, **more})


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_blocks_alone_are_trained() -> None:
    peft_model = quiet(
        peft.get_peft_model, tiny.llama(), peft.LoraConfig(**FIELDS, use_bdlora=peft.BdLoraConfig(**BLOCKS))
    )
    assert numbers(adapted()) == numbers(peft_model) == 2 * (2 * (4 * 16 + 4 * 32))


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize(
    "more",
    [{}, {"target_modules": ["q_proj", "o_proj", "v_proj"], "use_bdlora": {**BLOCKS, "match_strict": False}},
     {"rank_pattern": {"q_proj": 8}, "use_rslora": True}],
    ids=["strict", "and a plain one", "ranks"],
)  # fmt: skip
def test_files(more: dict[str, Any], start: Any, tmp_path: Path) -> None:
    more = {"init_lora_weights": start, **more}
    fields: dict[str, Any] = {**FIELDS, "use_bdlora": BLOCKS, **more}
    fields["use_bdlora"] = peft.BdLoraConfig(**fields["use_bdlora"])
    config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    if start is not False:  # B alone is then random, which one standard deviation does not tell
        same_start(tiny.llama, tmp_path, adapted(**more), config)
    both_ways(tiny.llama, tmp_path, adapted(**more), config)
    peftcore_model = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_bdlora"]
    peft_model = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["use_bdlora"]
    assert {**peft_model, **peftcore_model} == peft_model


def test_peft_s_own_file_stays_in_blocks(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", **FIELDS, use_bdlora=peft.BdLoraConfig(**BLOCKS))
    quiet(quiet(peft.get_peft_model, tiny.llama(), config).save_pretrained, tmp_path / "theirs")
    peftcore_model = peftcore.load(tiny.llama(), tmp_path / "theirs", trainable=True)
    assert numbers(peftcore_model) == numbers(adapted())
    peftcore.save(peftcore_model, tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[1][n], t) for n, t in files[0].items())


def test_a_config_of_peft_s_is_taken() -> None:
    config = peft.LoraConfig(**FIELDS, use_bdlora=peft.BdLoraConfig(**BLOCKS))
    assert numbers(peftcore.apply(tiny.llama(), config)) == numbers(adapted())


def test_training_keeps_what_is_beside_the_blocks_at_zero_and_merges() -> None:
    model = adapted()
    disturb(model, "default", seed=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
        optimizer.step()
    a, b = model.model.layers[0].self_attn.q_proj.peftcore["default"].pair()
    assert a.shape == (4, 32) and not b[:16, 2:].any() and not b[16:, :2].any() and b[:16, :2].all()
    expected = tiny.logits(model)
    torch.testing.assert_close(tiny.logits(peftcore.merge(model, undo=True)), expected, rtol=0, atol=1e-5)
    peftcore.unmerge(model)
    peftcore.convert(model, "default", method="lora", r=4, adapter="whole")
    peftcore.activate(model, ["whole"])
    torch.testing.assert_close(tiny.logits(model), expected, rtol=0, atol=1e-4)


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    for more, message in (
        ({"use_bdlora": {**BLOCKS, "nblocks": 3}}, r"nblocks=3 must divide r=4 and the 32 outputs of '.*q_proj'"),
        ({"use_bdlora": {**BLOCKS, "blocks": 3}}, "use_bdlora has no field 'blocks'. Its fields: target_modules_bd_a"),
        (
            {"use_bdlora": {**BLOCKS, "target_modules_bd_a": ["proj"]}},
            "q_proj' matches both target_modules_bd_a and target",
        ),
        ({"target_modules": ["q_proj", "v_proj"]}, r"v_proj' matches neither .* or choose match_strict=False"),
        (
            {"target_modules": ["embed_tokens"]},
            r"use_bdlora needs plain linear layers, and '.*' \(Embedding\) is not one",
        ),
        ({"lora_bias": True}, "use_bdlora is not supported with lora_bias=True. Leave one of them out"),
        ({"init_lora_weights": "pissa"}, "use_bdlora is not supported with init_lora_weights='pissa'"),
        ({"target_parameters": ["v_proj.weight"]}, "use_bdlora is not supported with target_parameters"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=message):
            adapted(**more)
    with pytest.raises(peftcore.PeftcoreError, match=r"use_bdlora=.* is not supported with DoRA"):
        peftcore.apply(tiny.llama(), "dora", use_bdlora=BLOCKS, **FIELDS)
