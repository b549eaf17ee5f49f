"""A reference computes what the model computed when it was kept, whatever its adapters have become since."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantized
import torch
from quantized import logits, moved

import peftcore
from peftcore.integrations.reference import FILE, Reference

METHODS = {
    "lora": {"r": 2},
    "adapter": {},
    "bitfit": {"add_missing": True},
    "prompt-tuning": {"num_virtual_tokens": 3},
    "prefix-tuning": {"num_virtual_tokens": 3},
}


def model(method: str = "lora", *, loaded: bool = False, quantize: bool = False) -> torch.nn.Module:
    found = quantized.llama()
    if quantize:
        peftcore.quantize(found)
    torch.manual_seed(0)
    peftcore.apply(found, method, **METHODS[method])
    return moved(found) if loaded else found


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
def test_it_is_what_the_model_was(method: str, loaded: bool, quantize: bool) -> None:
    found = model(method, loaded=loaded, quantize=quantize)
    before = logits(found)
    reference = Reference(found)
    after = logits(moved(found))
    assert not torch.equal(after, before)
    with reference.activated() as acting, reference.activated():
        assert acting is found
        torch.testing.assert_close(logits(found), before)
    assert torch.equal(logits(found), after)
    assert (reference.kept is None) == (method == "lora" and not loaded)


def test_what_changes_nothing_is_not_copied() -> None:
    """A trained parameter is compared with the base's, a change of a weight with that weight."""
    found = quantized.llama()
    peftcore.apply(found, "lora", r=2, modules_to_save=["lm_head"])
    assert Reference(found).kept is None
    with torch.no_grad():
        found.lm_head.weight[0, 0] += 1
    assert Reference(found).kept is not None


def test_a_frozen_adapter_below_stays() -> None:
    found = model(loaded=True)
    peftcore.engine.set_trainable(found, "default", False)
    before = logits(found)
    peftcore.apply(found, "lora", adapter="second", r=2)
    reference = Reference(found)
    moved(found)
    with reference.activated():
        torch.testing.assert_close(logits(found), before)
    peftcore.activate(found, "second")
    with pytest.raises(peftcore.PeftcoreError, match=r"made with adapters \['default', 'second'\] active, but"):
        reference.activated().__enter__()


def test_gradients_and_optimizer_do_not_notice(tmp_path: Path) -> None:
    found, twin = model(loaded=True), model(loaded=True)
    reference = Reference(found)
    for each in (found, twin):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss = each(**quantized.INPUTS, labels=quantized.INPUTS["input_ids"]).loss
            if each is found:
                with reference.activated():
                    logits(found)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("loaded", [False, True])
def test_save_and_restore(tmp_path: Path, loaded: bool) -> None:
    found = model(loaded=loaded)
    before = logits(found)
    Reference(found).save(tmp_path)
    other = Reference(moved(found))
    assert other.restore(tmp_path)
    assert not other.restore(tmp_path)
    with other.activated():
        torch.testing.assert_close(logits(found), before)


def test_restore_refuses_what_does_not_fit(tmp_path: Path) -> None:
    reference = Reference(model(loaded=True))
    with pytest.raises(peftcore.CheckpointError, match="has no reference model"):
        reference.restore(tmp_path)
    Reference(model("adapter", loaded=True)).save(tmp_path)
    with pytest.raises(peftcore.CheckpointError, match="belongs to other adapters, for example at 'default"):
        reference.restore(tmp_path)
    (tmp_path / FILE).write_bytes(b"torn")
    with pytest.raises(peftcore.CheckpointError, match="has no reference model"):
        reference.restore(tmp_path)


def test_merged_adapters_are_refused() -> None:
    found = peftcore.merge(model(loaded=True))
    with pytest.raises(peftcore.PeftcoreError, match="adapters are merged into the base"):
        Reference(found)


@pytest.mark.parametrize("loaded", [False, True])
def test_statistics_that_training_moves(loaded: bool) -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
    found = peftcore.apply(torch.nn.Sequential(*layers), "lora", r=2, target_modules=["0", "2"])
    x = torch.randn(8, 4)
    if loaded:
        moved(found)(x + 1)
    before = found.eval()(x)
    reference = Reference(found)
    moved(found.train())(x + 2)
    assert not torch.allclose(found.eval()(x), before)
    with reference.activated():
        torch.testing.assert_close(found(x), before)
