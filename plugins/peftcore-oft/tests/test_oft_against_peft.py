"""Hugging Face PEFT loads adapters saved here, and vice versa; rotations; block sizes; errors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peftcore_oft import OFTConfig, Rotation, Series, nearest_divisor
from support import tiny
from support.against_peft import both_ways, same_start

import peftcore
from peftcore.plugin import disturb

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"oft_block_size": 8}), ("llama", {"oft_block_size": 8, "use_cayley_neumann": False}),
     ("llama", {"oft_block_size": 16, "coft": True, "eps": 0.9}), ("llama", {"oft_block_size": 8, "block_share": True}),
     ("bert", {"r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": 2, "init_weights": False, "bias": "oft_only"}),
     ("t5", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
     ("t5", {"oft_block_size": 4, "num_cayley_neumann_terms": 4})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], **options}
    config = peft.OFTConfig(task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "oft", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "oft", **fields), config)


@pytest.mark.parametrize("options", [{"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 30}])
def test_blocks_are_turned(options: dict[str, Any]) -> None:
    rotation = Rotation(OFTConfig(**options), blocks=3, block_size=4)
    torch.nn.init.normal_(rotation.weight, std=0.1)
    x = torch.randn(5, 12)
    torch.testing.assert_close(rotation(x).view(5, 3, 4).norm(dim=-1), x.view(5, 3, 4).norm(dim=-1))
    assert (rotation(x) - x).abs().max() > 0.1


def test_coft_goes_on_from_where_it_was_brought_back_to() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    peftcore.apply(model, "oft", target_modules=["0"], oft_block_size=4, coft=True, eps=0.5)
    disturb(model, "default", seed=1, std=5.0)
    weight, x = model[0].peftcore["default"].oft_R.weight, torch.randn(3, 8)
    before = model(x)
    before.sum().backward()
    assert weight.norm() > 1 and weight.grad is not None and weight.grad.abs().max() > 0
    peftcore.after_step(model, 1, 2)
    limit = 0.5 / 2**0.5
    torch.testing.assert_close(2**0.5 * weight.norm(dim=1), torch.full((2,), limit))
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("coft", [True, False])
def test_training_of_coft_without_after_step_is_said(coft: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    peftcore.apply(model, "oft", target_modules=["0"], oft_block_size=4, coft=coft, eps=0.05)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    weight, x = model[0].peftcore["default"].oft_R.weight, torch.randn(3, 8)
    warning_counts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            warning_counts.append(len(caught))
    assert warning_counts == ([0, 1, 1, 1] if coft else [0] * 4)
    limit = 0.05 / 2**0.5
    if coft:
        assert (2**0.5 * weight.norm(dim=1)).min() > limit
        peftcore.after_step(model, 5, 5)
        torch.testing.assert_close(2**0.5 * weight.norm(dim=1), torch.full((2,), limit))


def test_a_share_of_the_blocks_rests_in_training() -> None:
    rotation = Rotation(OFTConfig(module_dropout=0.5), blocks=8, block_size=4)
    torch.nn.init.normal_(rotation.weight)
    x = torch.randn(5, 32)
    assert (rotation.train()(x) == x).view(5, 8, 4).all(-1).all(0).sum() == 4
    assert not (rotation.eval()(x) == x).any()


@pytest.mark.parametrize(
    ("size", "requested", "nearest"), [(48, 32, 24), (48, 44, 48), (7, 32, 7), (32, 8, 8), (30, 8, 6)]
)
def test_a_block_size_becomes_the_nearest_that_divides(size: int, requested: int, nearest: int) -> None:
    layer = peft.tuners.oft.layer.OFTLayer.adjust_oft_parameters
    assert nearest_divisor(size, requested) == nearest and (
        size % requested == 0 or layer(None, size, requested) == nearest
    )


def test_that_is_said() -> None:
    with pytest.warns(UserWarning, match=r"oft_block_size=32 does not divide .*. Used instead: 24 for 48 inputs"):
        peftcore.apply(tiny.llama(), "oft")


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    for fields, message in (
        ({"r": 4}, "one of r and oft_block_size must be 0 and the other positive, found r=4, oft_block_size=32"),
        ({"num_cayley_neumann_terms": 1}, "rotates nothing. Use 2 or more"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=message):
            peftcore.apply(tiny.llama(), "oft", **fields)
    with pytest.raises(peftcore.PeftcoreError, match=r"kernel_size=\(3, 3\), whose rotated patches PEFT puts back in"):
        peftcore.apply(tiny.convnet(), "oft", target_modules=["0"])
    folder = peftcore.save(peftcore.apply(tiny.llama(), "oft", oft_block_size=8), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["oft_block_size"]
    tiny.without_hash(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(peftcore.CheckpointError, match=r"OFT was saved by PEFT before 0\.14"):
        peftcore.load(tiny.llama(), folder)


@pytest.mark.parametrize("count", [1, 4])
def test_gradients_of_the_series_are_those_of_finite_differences(count: int) -> None:
    torch.manual_seed(0)
    q = (0.3 * torch.randn(2, 3, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: Series.apply(q, count), (q,))
