"""A factor of an adapter's change: in forward, merged, per sample, copied, on disk and with PEFT; and away again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import quiet
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_modules, applied
from peftcore.files.loading import restore
from peftcore.files.saving import save_each
from peftcore.plugin import Adapter, Around
from peftcore.testing import disturb

FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
TARGETS = ["q_proj", "down_proj"]


def adapted(make: Any = tiny.llama, **fields: Any) -> nn.Module:
    model = make()
    peftcore.apply(model, "lora", adapter="a", **{**FIELDS, "target_modules": TARGETS, **fields})
    disturb(model, "a", seed=1)
    return model


def halved_by_hand(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for _, module in adapter_modules(model, "a"):
            module.lora_B.mul_(0.5)
    return model


def test_the_change_is_multiplied_and_given_back_bit_for_bit() -> None:
    model = adapted()
    before, wanted = tiny.logits(model), tiny.logits(halved_by_hand(adapted()))
    assert peftcore.scale(model, "a", 0.5) is model
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=0, atol=1e-6)
    peftcore.scale(model, "a", 0.3)
    peftcore.scale(model, "a", 0.5)  # in place of the factor before
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=0, atol=1e-6)
    peftcore.scale(model, "a", 1)
    assert torch.equal(tiny.logits(model), before)


def test_it_holds_in_merging_copies_switches_and_beside_others() -> None:
    model, wanted = adapted(), tiny.logits(halved_by_hand(adapted()))
    base = tiny.logits(tiny.llama())
    peftcore.scale(model, "a", 0.5)
    again = copy.deepcopy(model)
    peftcore.scale(model, "a", 1.0)
    torch.testing.assert_close(tiny.logits(again), wanted, rtol=0, atol=1e-6)
    peftcore.merge(again, undo=True)
    torch.testing.assert_close(tiny.logits(again), wanted, rtol=0, atol=1e-6)
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot scale 'a': adapters are merged.*unmerge"):
        peftcore.scale(again, "a", 1.0)
    peftcore.unmerge(again)
    peftcore.activate(again, [])
    assert torch.equal(tiny.logits(again), base)
    peftcore.activate(again, ["a", None], per_sample=True)
    torch.testing.assert_close(tiny.logits(again)[0], wanted[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(tiny.logits(again)[1], base[1], rtol=0, atol=1e-6)
    peftcore.scale(again, "a", 0.0)
    torch.testing.assert_close(tiny.logits(again), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (tiny.llama, {}),
        (tiny.llama, {"use_rslora": True}),
        (tiny.llama, {"target_modules": ["embed_tokens", "q_proj"]}),
        (tiny.gpt2, {"target_modules": ["c_attn"], "alpha_pattern": {}}),
    ],
    ids=["plain", "rslora", "embedding", "gpt2"],
)
def test_files_have_it_as_peft_reads_it_and_here_it_comes_back(
    make: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(make, **fields)
    whole = tiny.logits(model)
    peftcore.scale(model, "a", 0.3)
    wanted = tiny.logits(model)
    quiet(peftcore.save, model, tmp_path, adapter="a")
    theirs = quiet(peft.PeftModel.from_pretrained, make(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**tiny.inputs(theirs.base_model.model)).logits, wanted, rtol=0, atol=1e-5)
    ours = quiet(peftcore.load, make(), tmp_path, adapter="a")
    assert torch.equal(tiny.logits(ours), wanted)
    assert applied(ours, "a").multiplier == 0.3
    peftcore.scale(ours, "a", 1.0)
    assert torch.equal(tiny.logits(ours), whole)
    config, own = applied(ours, "a").config, applied(model, "a").config
    assert (config.lora_alpha, config.alpha_pattern) == (own.lora_alpha, own.alpha_pattern)


def test_a_config_that_was_edited_since_is_what_counts(tmp_path: Path) -> None:
    model = adapted(alpha_pattern={})
    peftcore.save(peftcore.scale(model, "a", 0.5), tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    assert fields["lora_alpha"] == 3
    file.write_text(json.dumps({**fields, "lora_alpha": 12}))
    tiny.without_hash(tmp_path)
    wanted = tiny.logits(peftcore.scale(model, "a", 2.0))
    read = peftcore.load(tiny.llama(), tmp_path)
    assert applied(read, "default").multiplier == 1
    torch.testing.assert_close(tiny.logits(read), wanted, rtol=0, atol=1e-6)


def test_training_goes_on_with_it_and_a_checkpoint_brings_it_back(tmp_path: Path) -> None:
    model = adapted()
    peftcore.scale(model, "a", 0.5)
    model(**tiny.inputs(model)).logits.square().sum().backward()
    plain = halved_by_hand(adapted())
    plain(**tiny.inputs(plain)).logits.square().sum().backward()
    (_, one), (_, other) = (adapter_modules(m, "a")[0] for m in (model, plain))
    torch.testing.assert_close(one.lora_A.grad, other.lora_A.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.lora_B.grad, 0.5 * other.lora_B.grad, rtol=1e-4, atol=1e-4)
    save_each(model, tmp_path, ["a"])
    resumed = adapted()
    restore(resumed, tmp_path / "a", adapter="a")
    assert torch.equal(tiny.logits(resumed), tiny.logits(model))


def test_an_attention_is_scaled_whole() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    x = torch.linspace(-2, 2, 2 * 5 * 16).sin().view(2, 5, 16)
    peftcore.apply(layer, "lora", adapter="a", r=2, target_modules=["self_attn"])
    disturb(layer, "a", seed=3)
    halved = copy.deepcopy(layer)
    with torch.no_grad():
        for name, p in halved.named_parameters():
            if name.endswith("lora_B"):
                p.mul_(0.5)
    peftcore.scale(layer, "a", 0.5)
    torch.testing.assert_close(layer(x), halved(x), rtol=0, atol=1e-6)


def biased() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model.q_proj = nn.Linear(4, 4)
    return model


class Gain(Adapter):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return self.gain * base(x)

    def neutral(self) -> dict[str, Tensor]:
        return {"gain": torch.ones(())}


def gain(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
    return [Around("model.layers.0.self_attn.q_proj", Gain())]


def test_what_has_no_factor_is_refused() -> None:
    cases = {
        "prompt-tuning": ({"num_virtual_tokens": 2}, "its effect.* cannot be scaled"),
        "bitfit": ({}, r"it trains the base parameter '.*peftcore.combine\(model"),
        "lora": ({"bias": "all", "target_modules": ["q_proj"]}, "it trains the base parameter '.*bias'"),
    }
    for method, (fields, message) in cases.items():
        model = quiet(
            peftcore.apply,
            tiny.llama() if method == "prompt-tuning" else biased(),
            method,
            adapter="a",
            **fields,
        )
        with pytest.raises(peftcore.PeftcoreError, match=f"'a' .{method}. cannot be scaled: {message}"):
            peftcore.scale(model, "a", 0.5)
    with tiny.installed(tiny.method("gain", gain)):
        model = peftcore.apply(tiny.llama(), "gain", adapter="a")
        with pytest.raises(
            peftcore.PeftcoreError, match=r"cannot be scaled\. To make .*peftcore\.combine\(model, \['a'\]"
        ):
            peftcore.scale(model, "a", 0.5)


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), "0.5", None, True])
def test_a_factor_is_a_finite_number(factor: Any) -> None:
    with pytest.raises(peftcore.PeftcoreError, match="factor must be a finite number"):
        peftcore.scale(adapted(), "a", factor)
