"""Hugging Face PEFT loads adapters saved here, and vice versa; Bone's files; invalid configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.against_peft import both_ways, quiet, same_start

import peftcore
from peftcore.plugin import disturb

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"r": 8}),
     ("t5", {"r": 7, "init_weights": False}),
     ("bert", {"r": 16, "init_weights": "bat", "bias": "MiSS_only"}),
     ("llama", {"r": 16, "init_weights": "mini", "mini_r": 4})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], **options}
    config = quiet(peft.MissConfig, task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "miss", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "miss", **fields), config)


@pytest.mark.parametrize("variant", [True, "bat"])
def test_files_of_bone_are_read(variant: Any, tmp_path: Path) -> None:
    """As PEFT wrote them before 0.18, under which name Bone's formula was this one."""
    model = peftcore.apply(tiny.llama(), "miss", r=8, init_weights=variant, target_modules=["q_proj"])
    disturb(model, "default", seed=1)
    tensors = load_file(peftcore.save(model, tmp_path / "new") / "adapter_model.safetensors")
    (tmp_path / "old").mkdir()
    save_file({n.replace("miss_", "bone_"): t for n, t in tensors.items()}, tmp_path / "old/adapter_model.safetensors")
    fields = {"r": 8, "init_weights": variant, "target_modules": ["q_proj"], "bias": "none", "layers_pattern": None}
    config = {"peft_type": "BONE", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, **fields}
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(config))
    old = peftcore.load(tiny.llama(), tmp_path / "old")
    assert torch.equal(tiny.logits(old), tiny.logits(model))
    written = json.loads((peftcore.save(old, tmp_path / "again") / "adapter_config.json").read_text())
    assert written["peft_type"] == "MISS"


def test_inputs_are_dropped_in_training() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(3, 8)
    plain = model(x).detach()
    peftcore.apply(model, "miss", target_modules=["0"], r=8, miss_dropout=0.5)
    torch.nn.init.ones_(model[0].peftcore["default"].miss_block)
    kept = ((model.train()(x) - plain)[:, :1] / 2).detach()
    sums = {round(x[0][mask].sum().item(), 4) for mask in torch.cartesian_prod(*8 * [torch.tensor([True, False])])}
    assert round(kept[0].item(), 4) in sums and not torch.allclose(2 * kept, x.sum(1, keepdim=True))
    torch.testing.assert_close(model.eval()(x) - plain, x.sum(1, keepdim=True).expand(3, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 33}, "r=33 is above the inputs: '.*' has 32 inputs"),
        ({"r": 32, "init_weights": "bat"}, "init_weights='bat' needs sizes that r=32 divides"),
        ({"r": 8, "init_weights": "mini", "mini_r": 5}, "mini_r=5 does not divide the outputs"),
        ({"r": 8, "init_weights": "bat", "miss_dropout": 0.1}, "miss_dropout has no effect with init_weights='bat'"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(tiny.llama(), "miss", **fields)


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"'0' matches Conv2d .* which this method cannot adapt"):
        peftcore.apply(tiny.convnet(), "miss", target_modules=["0"])
