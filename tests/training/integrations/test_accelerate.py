"""accelerate's offloading of a model with adapters: they are trained and saved as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

import peftcore
from peftcore.testing import disturb

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 4}),
    ("dora", {"r": 4}),
    ("lora", {"r": 4, "modules_to_save": ["lm_head"]}),
    ("prompt-tuning", {"num_virtual_tokens": 2}),
]


def adapted(method: str, fields: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    model = peftcore.apply(tiny.llama(), method, **fields)
    disturb(model, "default", seed=1)
    return model


def offloaded(model: Any, where: str, folder: Path) -> Any:
    import accelerate

    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    parts |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    for name, device in (("peftcore_trained", "cpu"), ("model.peftcore", "disk")):
        if any(each.startswith(f"{name}.") for each in model.state_dict()):
            parts[name] = device
    return accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize(("method", "fields"), METHODS)
def test_adapters_of_an_offloaded_model_train(method: str, fields: dict[str, Any], where: str, tmp_path: Path) -> None:
    def step(model: Any) -> dict[str, torch.Tensor]:
        model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        torch.optim.SGD(trained.values(), lr=0.5).step()
        return gradients

    expected, model = adapted(method, fields), offloaded(adapted(method, fields), where, tmp_path / "disk")
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    wanted, found = step(expected), step(model)
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(wanted[name], found[name], rtol=1e-4, atol=1e-6) for name in wanted)
    peftcore.save(model, tmp_path / "adapter")
    loaded = peftcore.load(tiny.llama(), tmp_path / "adapter", check_base=False).eval()
    logits = expected.eval()(input_ids=tiny.TOKENS).logits
    assert torch.allclose(loaded(input_ids=tiny.TOKENS).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.allclose(model.eval()(input_ids=tiny.TOKENS).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_model_without_adapters_is_offloaded_whole(tmp_path: Path) -> None:
    adapted("lora", {"r": 4})  # from now on accelerate is patched
    assert all(parameter.is_meta for parameter in offloaded(tiny.llama(), "cpu", tmp_path).parameters())


def test_disk_offload_of_modules_to_save(tmp_path: Path) -> None:
    import accelerate

    expected = adapted("lora", {"r": 4, "modules_to_save": ["lm_head"]})
    model = adapted("lora", {"r": 4, "modules_to_save": ["lm_head"]})
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert model.model.embed_tokens.weight.is_meta
    logits = expected(input_ids=tiny.TOKENS).logits
    assert torch.allclose(model(input_ids=tiny.TOKENS).logits, logits, rtol=1e-4, atol=1e-5)


def test_merging_needs_a_model_without_hooks() -> None:
    from accelerate.hooks import remove_hook_from_module

    expected, model = adapted("lora", {"r": 4}), offloaded(adapted("lora", {"r": 4}), "cpu", Path())
    with pytest.raises(peftcore.PeftcoreError, match=r"accelerate offloads its weights .*remove_hook_from_module"):
        peftcore.merge(model, undo=True)
    remove_hook_from_module(model, recurse=True)
    peftcore.merge(model, undo=True)
    assert torch.equal(
        model(input_ids=tiny.TOKENS).logits, peftcore.merge(expected, undo=True)(input_ids=tiny.TOKENS).logits
    )
