"""CorDA and LoRA-GA: PEFT's directions, from a base that stays as it is."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from support import tiny
from support.against_peft import logits, quiet
from torch import Tensor

import peftcore
from peftcore.engine import adapter_modules
from peftcore.plugin import disturb

TARGETS = ["q_proj", "down_proj"]


def batches(rows: int = 1, count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 96, (rows, 24), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in tokens]


def products(model: torch.nn.Module) -> dict[str, Tensor]:
    return {path: (a.scale * a.lora_B @ a.lora_A).detach() for path, a in adapter_modules(model, "default")}


def products_of_peft(model: Any, paths: Any) -> dict[str, Tensor]:
    layers = {path: model.base_model.model.get_submodule(path) for path in paths}
    return {path: layer.get_delta_weight("default").detach() for path, layer in layers.items()}


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_peft_s(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT's module takes `dataclass` from attrs, which PEFT does not require.
    if importlib.util.find_spec("attr") is None:
        monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.corda import preprocess_corda

    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "corda"}
    model = peftcore.apply(tiny.llama(), "lora", batches=batches(), corda_config={"corda_method": method}, **fields)
    torch.testing.assert_close(logits(model), logits(tiny.llama()), rtol=0, atol=1e-6)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method), **fields
    )
    base = tiny.llama()
    preprocess_corda(base, config, run_model=lambda: [base(**batch) for batch in batches()])
    peft_model = quiet(peft.get_peft_model, base, config)
    peftcore_products = products(model)
    for path, expected in products_of_peft(peft_model, peftcore_products).items():
        size = expected.abs().max().item()
        torch.testing.assert_close(
            peftcore_products[path], expected, rtol=0, atol=(2e-2 if method == "kpm" else 1e-3) * size
        )


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_is_peft_s(direction: str, scale: str) -> None:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "lora_ga"}
    options = {"direction": direction, "scale": scale}
    data = batches(rows=1, count=1)  # whose gradient has as many singular values as tokens
    model = peftcore.apply(tiny.llama(), "lora", batches=data, lora_ga_config=options, **fields)
    torch.testing.assert_close(logits(model), logits(tiny.llama()), rtol=0, atol=1e-6)
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_ga_config=peft.LoraGAConfig(**options), **fields)
    base = tiny.llama()
    quiet(preprocess_loraga, base, config, lambda: [base(**batch).loss.backward() for batch in data])
    peft_model = quiet(peft.get_peft_model, base, config)
    for path, adapter in adapter_modules(model, "default"):
        layer = peft_model.base_model.model.get_submodule(path)
        for actual, expected in (
            (adapter.lora_A, layer.lora_A.default.weight),
            (adapter.lora_B.T, layer.lora_B.default.weight.T),
        ):
            torch.testing.assert_close(actual.norm(dim=1), expected.norm(dim=1), rtol=0.1, atol=1e-4)
            cosine = torch.nn.functional.cosine_similarity(actual[:2], expected[:2]).abs()
            assert cosine.min() > 0.9, (path, cosine)


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_others_read_it(start: str, tmp_path: Path) -> None:
    fields = {"r": 4, "target_modules": TARGETS, "init_lora_weights": start}
    model = peftcore.apply(tiny.llama(), "lora", batches=batches(rows=2), **fields)
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path)
    peft_model = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path).eval()
    torch.testing.assert_close(logits(peft_model), logits(model), rtol=0, atol=1e-5)
    assert torch.equal(logits(peftcore.load(tiny.llama(), tmp_path)), logits(model))
    peftcore.remove(model)
    assert torch.equal(logits(model), logits(tiny.llama()))
