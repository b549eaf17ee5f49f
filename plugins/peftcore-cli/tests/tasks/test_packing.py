"""Packed rows: nothing is lost, no example sees another; a model or method that cannot keep them apart is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from peftcore_cli.tasks import packing
from peftcore_cli.tasks.registered import find
from support.commands import Run

import peftcore

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}


def example(*ids: int) -> dict[str, list[int]]:
    return {"input_ids": list(ids), "labels": [-100, *ids[1:]] if len(ids) % 2 else list(ids)}


EXAMPLES = [example(5, 6, 7, 8), example(9, 10, 11), example(12, 13), example(14, 15, 16, 17, 18), example(19, 20, 21)]


def pack(examples: list[dict[str, list[int]]], length: int) -> packing.PackedRows:
    return packing.PackedRows(examples, packing.pack([len(each["input_ids"]) for each in examples], length))


@given(st.lists(st.integers(2, 9), min_size=1, max_size=30))
def test_every_example_is_in_one_row(sizes: list[int]) -> None:
    examples = [example(*range(100 * i, 100 * i + size)) for i, size in enumerate(sizes)]
    rows = pack(examples, 9)
    found = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 9
        begins = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for begin, end in zip(begins, [*begins[1:], len(row["input_ids"])], strict=True):
            found.append((row["input_ids"][begin:end], row["labels"][begin:end]))
            assert row["position_ids"][begin:end] == list(range(end - begin))
    wanted = [(each["input_ids"], [-100, *each["labels"][1:]]) for each in examples]
    assert sorted(found) == sorted(wanted)
    half = sum(1 for row in rows if len(row["input_ids"]) <= 4)
    assert half <= 1, "two rows that are half empty would have been one"


def models() -> dict[str, Any]:
    import transformers as t

    rest = {"intermediate_size": 48, "pad_token_id": 0}
    return {
        "rotary": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **rest)),
        "learned positions": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40)),
        "sliding window": lambda: t.MistralForCausalLM(
            t.MistralConfig(**SIZES, **rest, num_key_value_heads=2, sliding_window=3)
        ),
        "experts": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**SIZES, **rest, num_local_experts=2, num_key_value_heads=4)
        ),
        "a state": lambda: t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=40)),
        "biases of distance": lambda: t.BloomForCausalLM(
            t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=40)
        ),
    }


@pytest.fixture(params=["rotary", "learned positions", "sliding window", "experts"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = models()[request.param]()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_of_packed_rows_is_that_of_the_examples(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    peftcore.apply(model, "lora", r=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    packing.check(model, EXAMPLES, "the model")
    rows = pack(EXAMPLES, 9)
    assert len(rows) == 2 and len(rows[0]["input_ids"]) != len(rows[1]["input_ids"]), "one row is padded"
    results = []
    for batches in ([packing.collate(rows, 0)], [packing.collate(pack([each], 9), 0) for each in EXAMPLES]):
        model.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            total = total + model(**batch).loss * int((batch["labels"] != -100).sum())
        total.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        results.append((total.detach(), gradients))
    (one, of_one), (other, of_other) = results
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for mine, theirs in zip(of_one, of_other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["a state", "biases of distance"])
def test_a_model_that_cannot_is_refused(kind: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(
        peftcore.PeftcoreError, match="--pack does not work with Model, which does not separate packed examples"
    ):
        packing.check(models()[kind](), EXAMPLES, "Model")


def test_a_cache_would_mix_them(model: Any) -> None:
    """Why batches say use_cache=False: with one, transformers takes no notice of positions."""
    batch = packing.collate(pack(EXAMPLES, 9), 0)
    with torch.no_grad():
        mixed, apart = (model(**{**batch, "use_cache": use_cache}).loss for use_cache in (True, False))
    assert abs(float(mixed - apart)) > 1e-4


def test_an_invocation_in_each_example_is_found() -> None:
    made = models()["rotary"]()
    peftcore.apply(made, "alora", alora_invocation_tokens=[7], r=2)
    packing.check(made, EXAMPLES, "alora")


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_a_method_that_acts_on_a_whole_row_is_refused(method: str) -> None:
    """Vectors before the row."""
    torch.manual_seed(0)
    made = models()["rotary"]()
    peftcore.apply(made, method)
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    with pytest.raises(peftcore.PeftcoreError, match=f"--pack does not work with {method}"):
        packing.check(made, EXAMPLES, method)
    assert all(torch.equal(before[name], parameter) for name, parameter in made.named_parameters())
    assert made.training


def test_training_on_packed_rows(
    run: Run, llama: Path, reviews: Path, bert: Path, labelled: Path, tmp_path: Path
) -> None:
    method = ("--method", "lora", "--set", "r=4", "--lr", "0.02", "--steps", 8, "--batch-size", 1)
    shown = run(
        "train",
        "-m",
        llama,
        "-d",
        reviews,
        "--eval-data",
        reviews,
        "-o",
        tmp_path / "run",
        *method,
        "--pack",
        "--max-length",
        32,
    )
    assert "packed 14 examples into 5 rows of at most 32 tokens" in shown.output
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["after"]["loss"] < 0.7 * found["before"]["loss"]
    evaluated = run("eval", tmp_path / "run", "-d", reviews).output
    assert f"{found['after']['loss']:.4f}" in evaluated
    refused = run("train", "-m", bert, "-d", labelled, "-o", tmp_path / "no", *method, "--pack", code=1).output
    assert "--pack only works with causal-lm (the task is classification)" in refused


def test_packed_rows_are_padded_as_examples_of_their_own(llama: Path) -> None:
    tokenizer = type("Tokenizer", (), {"pad_token_id": 3})()
    batch = find("causal-lm").collator(tokenizer)(pack([example(5, 6, 7), example(8, 9)], 3))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]] and batch["labels"].tolist()[1] == [-100, 9, -100]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]] and "attention_mask" not in batch
