"""EVA: A is the main directions of a layer's inputs, ranks go where these explain most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peftcore_lora.eva import Components
from support import tiny
from support.against_peft import logits, quiet
from torch import Tensor

import peftcore
from peftcore.engine import adapter_modules, applied
from peftcore.model import inputs_of

FIELDS: dict[str, Any] = {"r": 4, "init_lora_weights": "eva", "target_modules": ["q_proj", "down_proj"]}


def batches(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        tokens = torch.randint(3, 96, (4, 16), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, 12:] = 0
        result.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)})
    return result


def all_inputs(path: str) -> Tensor:
    """Of a layer, padding left out, around their mean, in float64."""
    rows: list[Tensor] = []
    inputs_of(tiny.llama(), [path], batches(), lambda _, x, batch: rows.append(x[batch["attention_mask"] == 1]))
    x = torch.cat(rows).double()
    return x - x.mean(0)


def variance(path: str, directions: Tensor) -> float:
    """How much of the inputs' variance lies in orthonormal directions."""
    x = all_inputs(path)
    return ((x @ directions.detach().double().T).square().sum() / x.square().sum()).item()


def overlap(a: Tensor, b: Tensor) -> float:
    """1 where two sets of orthonormal rows span the same space."""
    return ((a.double() @ b.double().T).square().sum() / len(a)).item()


def test_the_components_are_those_of_all_inputs() -> None:
    model = tiny.llama()
    path = "model.layers.1.mlp.down_proj"
    expected = torch.linalg.svd(all_inputs(path), full_matrices=False)[2][:4]
    peftcore.apply(model, "lora", batches=batches(), **{**FIELDS, "eva_config": {"rho": 1.0, "tau": 1.0}})
    torch.testing.assert_close(logits(model), logits(tiny.llama()), rtol=0, atol=0)
    adapter = model.get_submodule(path).peftcore["default"]
    assert overlap(adapter.lora_A.detach(), expected) > 0.98
    assert adapter.lora_B.abs().max() == 0 and adapter.lora_B.requires_grad


def test_the_directions_explain_as_much_as_peft_s() -> None:
    fields = {**FIELDS, "eva_config": {"rho": 1.0, "tau": 0.9}}
    model = peftcore.apply(tiny.llama(), "lora", batches=batches() * 3, **fields)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**fields, "eva_config": peft.EvaConfig(rho=1.0, tau=0.9)})
    peft_model = quiet(peft.get_peft_model, tiny.llama(), config)
    quiet(peft.initialize_lora_eva_weights, peft_model, batches(), show_progress_bar=False)
    adapters = dict(adapter_modules(model, "default"))
    peft_factors = {name: p for name, p in peft_model.named_parameters() if "lora_A" in name}
    for path, adapter in adapters.items():
        (tensor,) = (p for name, p in peft_factors.items() if path in name)
        assert variance(path, adapter.lora_A) >= variance(path, tensor) - 1e-6


def test_ranks_go_where_they_explain_most(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "lora", batches=batches(), **FIELDS)
    ranks = {path: len(adapter.lora_A) for path, adapter in adapter_modules(model, "default")}
    assert sum(ranks.values()) == 4 * len(ranks) and len(set(ranks.values())) > 1 and max(ranks.values()) <= 8
    assert {adapter.scale for _, adapter in adapter_modules(model, "default")} == {2.0}
    config = applied(model, "default").config
    assert all(config.rank_pattern.get(path, 4) == rank for path, rank in ranks.items())
    peftcore.testing.disturb(model, "default", 1)
    peftcore.save(model, tmp_path)
    assert torch.equal(logits(peftcore.load(tiny.llama(), tmp_path)), logits(model))
    peft_model = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path).eval()
    torch.testing.assert_close(logits(peft_model), logits(model), rtol=0, atol=1e-5)


def test_a_layer_of_rank_pattern_is_loaded_with_its_new_rank(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    model = peftcore.apply(
        tiny.llama(), "lora", batches=batches(), **{**FIELDS, "rank_pattern": {path: 2}, "alpha_pattern": {path: 4}}
    )
    assert len(model.get_submodule(path).peftcore["default"].lora_A) == 4
    peftcore.testing.disturb(model, "default", 1)
    peftcore.save(model, tmp_path)
    assert torch.equal(logits(peftcore.load(tiny.llama(), tmp_path)), logits(model))


def test_settled_components_need_no_more_batches() -> None:
    numbers: list[int] = []

    def count_batches() -> Any:
        for number, batch in enumerate(batches(3) * 50):
            numbers.append(number)
            yield batch

    peftcore.apply(tiny.llama(), "lora", batches=count_batches(), **{**FIELDS, "eva_config": {"tau": 0.9}})
    assert 1 < len(numbers) < 150


@pytest.mark.parametrize("sizes", [[40], [20, 20], [8, 30, 9, 3]])
def test_batches_of_any_size_give_one_result(sizes: list[int]) -> None:
    torch.manual_seed(0)
    x = (torch.randn(sum(sizes), 3) @ torch.randn(3, 12) + torch.randn(12)).float()  # of rank 3 around its mean
    components = Components(3, 1.0)
    for part in x.split(sizes):
        components.add(part)
    used_rows = x if sizes[-1] >= 3 else x[: -sizes[-1]]
    _, values, vectors = torch.linalg.svd((used_rows - used_rows.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(components.values[:3], values[:3], rtol=1e-4, atol=1e-5)
    assert overlap(components.vectors[:3], vectors[:3]) > 0.9999
    torch.testing.assert_close(components.explained_variance().sum().item(), 1.0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "batches_given", "message"),
    [
        ({}, None, r"init_lora_weights='eva' needs data. Pass .* peftcore.apply\(..., batches="),
        ({}, [], "`batches` is empty"),
        ({"eva_config": {"rhoo": 2.0}}, batches(1), "eva_config has no field 'rhoo'. Its fields: rho, tau"),
        ({"eva_config": {"rho": 0.5}}, batches(1), "rho must be 1 or more, found 0.5"),
        ({"r": 40}, batches(1), r"no batch had at least 32 tokens for 'model.layers.0.self_attn.q_proj'|at least"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], batches_given: Any, message: str) -> None:
    model = tiny.llama()
    if "r" in changes:
        batches_given = [{name: value[:1] for name, value in batch.items()} for batch in batches_given]
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(model, "lora", batches=batches_given, **{**FIELDS, **changes})
    assert torch.equal(logits(model), logits(tiny.llama()))
