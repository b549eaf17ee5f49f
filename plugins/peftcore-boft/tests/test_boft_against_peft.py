"""Hugging Face PEFT loads adapters saved here, and vice versa, also products of rotations; errors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_layer
from support import tiny
from support.against_peft import both_ways, logits, moved, quiet, same_start

import peftcore
from peftcore.plugin import disturb

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def block_diagonals(blocks: torch.Tensor) -> list[torch.Tensor]:
    """Return what PEFT's CUDA kernel computes. PEFT needs it for several rotations and compiles it on a GPU machine."""
    return [torch.stack([torch.block_diag(*group) for group in blocks])]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"boft_block_size": 4}), ("bert", {"boft_block_size": 0, "boft_block_num": 4, "bias": "boft_only"}),
     ("t5", {"boft_block_size": 4, "boft_n_butterfly_factor": 3, "init_weights": False}),
     ("bert", {"boft_block_size": 2, "boft_n_butterfly_factor": 4})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_layer, "_FBD_CUDA", SimpleNamespace(forward=block_diagonals))
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], **options}
    config = peft.BOFTConfig(task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "boft", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "boft", **fields), config)


def test_files_of_peft_without_its_kernel_have_one_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's config says three, which need not fit the layers."""
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", lambda: None)
    config = peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=16, boft_n_butterfly_factor=3)
    peft_model = moved(quiet(peft.get_peft_model, tiny.llama(), config).eval())
    quiet(peft_model.save_pretrained, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 3
    model = peftcore.load(tiny.llama(), tmp_path / "peft")
    assert (logits(model) - logits(tiny.llama())).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), logits(peft_model), rtol=0, atol=1e-5)
    peftcore.save(model, tmp_path / "peftcore")
    assert json.loads((tmp_path / "peftcore" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 1
    reloaded = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path / "peftcore").eval()
    torch.testing.assert_close(logits(reloaded), logits(peft_model), rtol=0, atol=1e-5)


def adapted(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 20))
    return peftcore.apply(model, "boft", target_modules=["0"], **fields)


def test_the_product_merges() -> None:
    model, x = adapted(boft_n_butterfly_factor=3), torch.randn(3, 32)
    disturb(model, "default", seed=1)
    expected = model(x)
    torch.testing.assert_close(peftcore.merge(model, undo=True)(x), expected)


def test_a_share_of_one_rotation_s_blocks_rests_in_training() -> None:
    model, x = adapted(boft_dropout=0.5), torch.randn(3, 32)
    disturb(model, "default", seed=1)
    boft = model[0].peftcore["default"]
    torch.nn.init.ones_(boft.boft_s)
    outputs: list[torch.Tensor] = []
    rotated = boft.rotated
    boft.rotated = lambda *args: outputs.append(rotated(*args)) or outputs[-1]
    model.train()(x)
    assert (outputs[0] == x).view(3, 8, 4).all(-1).all(0).sum() == 4


def test_what_does_not_fit_is_refused() -> None:
    for fields, message in (
        ({"boft_block_size": 5}, "boft_block_size=5 does not divide the 32 inputs of '0'"),
        ({"boft_block_num": 2}, "one of boft_block_size and boft_block_num must be 0"),
        (
            {"boft_n_butterfly_factor": 5},
            "needs an even block size and a number of blocks divisible by 16, but '0' has 8 blocks of 4",
        ),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=message):
            adapted(**fields)
