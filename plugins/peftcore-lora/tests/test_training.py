"""LoRA+ and LoRA-FA, beside PEFT's optimizers; layers that stand several times."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peftcore_lora import replicate_layers
from support import tiny
from support.against_peft import logits, quiet
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.plugin import disturb

FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
        optimizer.step()


def pair(tmp_path: Path, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and PEFT's with the same values."""
    peftcore_model = peftcore.apply(tiny.llama(), "lora", **FIELDS, **fields)
    peftcore.save(peftcore_model, tmp_path)
    return peftcore_model, quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path, is_trainable=True)


def peft_factors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.detach()
        for name, p in model.named_parameters()
        if ".lora_" in name
    }


def test_lora_plus(tmp_path: Path) -> None:
    peftcore_model, peft_model = pair(tmp_path, lora_plus_ratio=16.0)
    groups = peftcore.parameter_groups(peftcore_model, lr=1e-3, weight_decay=0.01)
    assert [(group["lr"], len(group["params"])) for group in groups] == [(16e-3, 4), (1e-3, 4)]
    train_steps(peftcore_model, torch.optim.AdamW(groups))
    kwargs = {"loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.01}
    train_steps(peft_model, create_loraplus_optimizer(peft_model, torch.optim.AdamW, lr=1e-3, **kwargs))
    expected = peft_factors(peft_model)
    for name, parameter in adapter_parameters(peftcore_model, "default"):
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6)
    peftcore.save(peftcore_model, tmp_path / "again")
    reloaded = peftcore.load(tiny.llama(), tmp_path / "again")
    assert peftcore.engine.applied(reloaded, "default").config.lora_plus_ratio == 16.0


def test_lora_fa(tmp_path: Path) -> None:
    """PEFT projects in bf16 where the machine has it, so that its steps are near, and its formula is the measure."""
    peftcore_model, peft_model = pair(tmp_path, lora_fa=True)
    assert {name.rpartition(".")[2] for name, _ in adapter_parameters(peftcore_model, "default")} == {"lora_B"}
    before = {name: tensor.clone() for name, tensor in peft_factors(peft_model).items()}
    plain = peftcore.apply(tiny.llama(), "lora", **FIELDS)
    with torch.no_grad():
        for name, parameter in adapter_parameters(plain, "default"):
            parameter.copy_(before[name])
    for model in (peftcore_model, plain):
        model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
    parameters = dict(adapter_parameters(peftcore_model, "default"))
    for name, other in peftcore_factors(plain).items():
        if name.endswith("lora_B"):
            a = before[name.replace("lora_B", "lora_A")]
            expected = other @ torch.linalg.inv(a @ a.T) / 1.5**2
            torch.testing.assert_close(parameters[name].grad, expected, rtol=1e-3, atol=1e-6)
    optimizer = create_lorafa_optimizer(peft_model, r=4, lora_alpha=6, lr=1e-2)
    for group in optimizer.param_groups:
        group["eps"] = 1e-20  # of theirs it is not corrected as PyTorch's is
    train_steps(peft_model, optimizer)
    train_steps(
        peftcore_model,
        torch.optim.AdamW(peftcore.parameter_groups(peftcore_model, lr=1e-2), eps=1e-20, weight_decay=0.0),
    )
    wanted_b = peft_factors(peft_model)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, wanted_b[name], rtol=0.05, atol=2e-3)
    acting = logits(peftcore_model)
    peftcore.save(peftcore_model, tmp_path / "again")
    assert torch.equal(logits(peftcore.load(tiny.llama(), tmp_path / "again")), acting)
    peftcore.merge(peftcore_model, undo=True)
    torch.testing.assert_close(logits(peftcore_model), acting, rtol=0, atol=1e-5)


def peftcore_factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in adapter_parameters(model, "default") if p.grad is not None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_plus_ratio": 0.0}, r"lora_plus_ratio must be above 0, found 0.0"),
        ({"lora_fa": True, "init_lora_weights": "pissa"}, r"lora_fa=True freezes A .*'pissa' does not allow"),
        (
            {"lora_fa": True, "target_modules": ["embed_tokens"]},
            r"for linear layers, and 'model.embed_tokens' is not one",
        ),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"Call peftcore_lora.replicate_layers"),
        ({"layer_replication": [[0, 2, 1]]}, r"\[first, last \+ 1\]"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(tiny.llama(), "lora", **fields)


def test_layers_that_stand_several_times() -> None:
    """Each place has an adapter of its own, over one weight."""
    base = tiny.llama()
    model = replicate_layers(copy.deepcopy(base), [[0, 2], [1, 2]])
    layers = model.model.layers
    assert len(layers) == model.config.num_hidden_layers == 3
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight is not layers[0].mlp.up_proj.weight
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    peftcore.apply(model, "lora", target_modules=["up_proj"], layer_replication=[[0, 2], [1, 2]])
    disturb(model, "default", seed=1)
    first, second = (layers[i].mlp.up_proj.peftcore["default"].lora_B for i in (1, 2))
    assert not torch.equal(first, second)
    out = model.generate(
        tiny.TOKENS, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        whole = model(input_ids=out.sequences).logits[:, tiny.TOKENS.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=0, atol=1e-5)
    with pytest.raises(peftcore.PeftcoreError, match="tied to"):
        peftcore.merge(model, undo=True)
    with pytest.raises(peftcore.PeftcoreError, match="names layers that do not exist: the model has 2"):
        replicate_layers(base, [[0, 3]])
