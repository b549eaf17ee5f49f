"""Blocks after a text are computed as prefixes with continuations alone, or the model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from commands import SPECIAL, WORDS
from transformers import AutoConfig, AutoModelForCausalLM

import peftcore
from peftcore import PeftcoreError
from peftcore.cli.training import block_rollouts

SHAPE = {"vocab_size": len(SPECIAL + WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {**SHAPE, **WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 64}
TEXT = torch.randint(4, SHAPE["vocab_size"], (20,), generator=torch.Generator().manual_seed(0))


def adapted(kind: str, method: str = "lora", **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SHAPE} if kind == "gpt2" else SIZES
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **changes})).eval()
    peftcore.apply(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_prefixes() -> None:
    assert block_rollouts.ends(20, 4, 8, 4) == [4, 12]
    assert block_rollouts.ends(20, 4, 8, 8) == [4, 12]
    assert block_rollouts.ends(20, 4, 8, 9) == [4]
    assert block_rollouts.ends(20, 16, 8, 5) == []


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("gpt2", {}), ("mistral", {"sliding_window": 25}), ("granite", {"logits_scaling": 3.0})],
)
@pytest.mark.filterwarnings("ignore:Using a different")
def test_blocks_are_computed_as_texts_alone(kind: str, changes: dict[str, Any]) -> None:
    """Also where the row is longer than the window of the layers, and each text is not."""
    model = adapted(kind, **changes)
    prefixes, seen = torch.tensor([1, 4, 4, 9, 17]), []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return (logits.argmax(-1) + torch.arange(5)) % SHAPE["vocab_size"]

    found = block_rollouts.continued(model, TEXT, prefixes, 3, choose)
    with torch.no_grad():
        row = block_rollouts.row(model, TEXT, prefixes, found)
        logits = block_rollouts.logits(model, row, found)
        for k, size in enumerate(prefixes.tolist()):
            alone = model(torch.cat([TEXT[:size], found[k]])[None]).logits[0, size - 1 : -1]
            torch.testing.assert_close(logits[k], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.stack(seen, 1)[k], alone, rtol=1e-4, atol=1e-5)
    block_rollouts.check(model, TEXT.tolist(), 4, 3)
    block_rollouts.check(model, TEXT[:5].tolist(), 1, 4)


@pytest.mark.parametrize(
    ("kind", "method", "changes"),
    [
        ("mistral", "lora", {"sliding_window": 6}),
        ("bloom", "lora", {"n_layer": 2, "n_head": 4}),
        ("llama", "prefix-tuning", {}),
        ("llama", "prompt-tuning", {}),
    ],
)
def test_models_that_compute_something_else_are_refused(kind: str, method: str, changes: dict[str, Any]) -> None:
    with pytest.raises(PeftcoreError, match=r"--ebft mode=strided: \w+ with its adapter does not compute blocks"):
        block_rollouts.check(adapted(kind, method, **changes), TEXT.tolist(), 4, 3)


def test_log_probabilities_are_those_of_the_temperature() -> None:
    logits, tokens = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1, 4]] * 2)
    found = block_rollouts.log_probabilities(logits, tokens, 0.5)
    for row in range(2):
        for place, token in enumerate((0, 1, 4)):
            powers = (logits[row, place].double() / 0.5).exp()
            assert float(found[row, place].exp()) == pytest.approx(float(powers[token] / powers.sum()), rel=1e-5)


def test_samples_have_the_probabilities_of_the_temperature() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0])
    drawn = block_rollouts.sampled(0.5)(logits.expand(20_000, 3))
    wanted = (logits / 0.5).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=3) / 20_000, wanted, rtol=0, atol=0.015)
    assert block_rollouts.sampled(0.0)(logits[None]).tolist() == [2]
