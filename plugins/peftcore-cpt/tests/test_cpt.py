"""CPT beside Hugging Face PEFT's: logits, losses, gradients, training, and files in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.against_peft import both_ways, quiet
from support.trainers import trainer
from support.whole_run import nightly_but
from torch import nn

import peftcore
from peftcore.plugin import disturb

IDS = [5, 17, 40, 8, 21, 33, 9, 11]
TYPES = [1, 2, 3, 4, 5, 6, 0, 8]
FIELDS: dict[str, Any] = {"cpt_token_ids": IDS, "cpt_tokens_type_mask": TYPES}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"cpt_token_ids": None, "cpt_tokens_type_mask": None},
    "all of type 1": {"cpt_tokens_type_mask": None},
    "decay": {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.6},
    "a factor without decay": {"opt_loss_decay_factor": 0.6},
    "wider": {"opt_projection_epsilon": 3.0, "opt_projection_format_epsilon": 5.0},
    "nowhere to go": {"opt_projection_epsilon": 0.0},
    "masked": {"cpt_mask": [0, 1, 1, 1, 0, 1, 1, 1], "tokenizer_name_or_path": "some/tokenizer"},
}
MAKES = {"llama": tiny.llama, "gpt2": tiny.gpt2}
INPUT_TYPES = torch.tensor([[1, 2, 2, 3, 4, 0, 8], [2, 2, 3, 4, 4, 4, 0]])


def peft_cpt(make: Any, **fields: Any) -> Any:
    config = peft.CPTConfig(task_type="CAUSAL_LM", **fields)
    return quiet(peft.get_peft_model, make(), config).eval()


def call(with_types: bool) -> dict[str, Any]:
    tokens = tiny.TOKENS
    labels = tokens.clone()
    labels[0, 1] = labels[1, 3] = -100
    types = {"input_type_mask": INPUT_TYPES[:, : tokens.shape[1]].clone()} if with_types else {}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels, **types}


@pytest.mark.parametrize("kind", nightly_but(MAKES, ["llama"]))
@pytest.mark.parametrize("case", list(OTHERS))
def test_files(case: str, kind: str, tmp_path: Path) -> None:
    fields = {**FIELDS, "opt_projection_epsilon": 4.0, "opt_projection_format_epsilon": 4.0, **OTHERS[case]}
    model = peftcore.apply(MAKES[kind](), "cpt", **fields)
    both_ways(MAKES[kind], tmp_path, model, peft.CPTConfig(task_type="CAUSAL_LM", **fields))


@pytest.mark.parametrize("with_types", [False, True])
@pytest.mark.parametrize("case", [case for case in OTHERS if case not in ("one token", "all of type 1")])
def test_loss_and_gradients(case: str, with_types: bool, tmp_path: Path) -> None:
    fields = {**FIELDS, **OTHERS[case]}
    peft_model, peftcore_model = peft_cpt(tiny.llama, **fields), peftcore.apply(tiny.llama(), "cpt", **fields)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=5.0) for m in (peft_model, peftcore_model)
    ]
    for step in range(1, 4):
        outputs = [quiet(model, **call(with_types)) for model in (peft_model, peftcore_model)]
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=0, atol=1e-5)
        expected = outputs[0].logits[:, -tiny.TOKENS.shape[1] :]
        torch.testing.assert_close(outputs[1].logits, expected, rtol=0, atol=1e-5)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        peftcore.after_step(peftcore_model, step, 3)
    peftcore.save(peftcore_model, tmp_path / "peftcore")
    quiet(peft_model.save_pretrained, tmp_path / "peft")
    rows, expected = (load_file(tmp_path / library / "adapter_model.safetensors") for library in ("peftcore", "peft"))
    torch.testing.assert_close(rows["prompt_embeddings"], expected["prompt_embeddings"], rtol=0, atol=1e-5)


def test_what_may_not_move_stays_and_the_rest_is_on_its_ball() -> None:
    model = peftcore.apply(tiny.llama(), "cpt", **FIELDS, opt_projection_epsilon=2.0)
    disturb(model, "default", seed=1, std=3.0)
    peftcore.after_step(model, 1, 1)
    prompt: Any = next(module for module in model.modules() if hasattr(module, "delta_embedding"))
    moves = (prompt() - prompt.embedding).norm(dim=1) / (prompt.hidden / 2048) ** 0.5
    expected = torch.tensor([0.1, 2.0, 0.1, 0.0, 0.1, 2.0, 0.0, 0.0])
    torch.testing.assert_close(moves, expected, rtol=0, atol=1e-5)


def test_training_goes_on_around_the_start(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "cpt", **FIELDS)
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path / "whole")
    peftcore.save(model, tmp_path / "small", resumable=False)
    assert list(load_file(tmp_path / "small" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    starts = []
    for folder in ("whole", "small"):
        reloaded = peftcore.load(tiny.llama(), tmp_path / folder)
        torch.testing.assert_close(tiny.logits(reloaded), tiny.logits(model), rtol=0, atol=1e-6)
        starts.append(next(m.embedding for m in reloaded.modules() if hasattr(m, "delta_embedding")))
    assert torch.equal(starts[0], tiny.llama().model.embed_tokens.weight[IDS])
    assert not torch.equal(starts[1], starts[0])


def test_padding_and_other_outputs_leave_the_loss() -> None:
    """Of rows that are padded on the left it is that of each row alone; hidden states and tuples are the input's."""
    model = peftcore.apply(tiny.llama(), "cpt", **FIELDS)
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    ids[0], ids[1, 2:] = torch.arange(20, 26), torch.arange(30, 34)
    mask[0], mask[1, 2:] = 1, 1
    labels = ids.where(mask == 1, -100)
    labels[1, 2] = -100  # as everywhere, a padding's output would be its prediction
    actual = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    rows = [model(input_ids=ids[i : i + 1, pad:], labels=labels[i : i + 1, pad:]).loss for i, pad in ((0, 0), (1, 2))]
    counts = [2 + 6, 2 + 3]  # its own outputs, and the input's tokens
    expected = (rows[0] * counts[0] + rows[1] * counts[1]) / sum(counts)
    torch.testing.assert_close(actual.loss, expected, rtol=0, atol=1e-5)
    assert actual.logits.shape[1] == 6 and {states.shape[1] for states in actual.hidden_states} == {6}
    plain = model(input_ids=ids, attention_mask=mask, labels=labels, return_dict=False)
    torch.testing.assert_close(plain[0], actual.loss)
    torch.testing.assert_close(plain[1], actual.logits)


def test_a_trainer_that_accumulates_adds_what_one_batch_gives(tmp_path: Path) -> None:
    losses = []
    for size, steps in ((8, 1), (2, 4)):
        model: nn.Module = peftcore.apply(tiny.llama(), "cpt", **FIELDS)
        run = trainer(tmp_path, model, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        losses.append(run.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    def refused(match: str, make: Any = tiny.llama, **fields: Any) -> None:
        with pytest.raises(peftcore.PeftcoreError, match=match):
            peftcore.apply(make(), "cpt", **fields)

    refused("the same length, found 2 tokens", cpt_token_ids=[1, 2], cpt_mask=[1])
    refused("the same length, found 0 tokens", cpt_token_ids=[])
    refused("must not contain negative numbers", cpt_token_ids=[1, -2])
    refused("opt_projection_epsilon must not be negative", opt_projection_epsilon=-1.0)
    refused("cpt_token_ids contains 5000, but the model", cpt_token_ids=[5000])
    refused("CPT is for text decoders with a head", tiny.t5)
    model = peftcore.apply(tiny.llama(), "cpt", **FIELDS)
    with pytest.raises(peftcore.PeftcoreError, match="needs logits of the 8 prompt tokens"):
        model(**call(False), logits_to_keep=1)
    with pytest.raises(peftcore.PeftcoreError, match="reads labels by name"):
        model(tiny.TOKENS, None, None, None, None, tiny.TOKENS)
    model = peftcore.apply(tiny.llama(), "cpt", cpt_token_ids=IDS)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"ends with type 1, .* would have type 5, which is not an output's"
    ):
        model(**call(False))
