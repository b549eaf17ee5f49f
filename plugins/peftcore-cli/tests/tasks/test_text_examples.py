"""How rows become tensors, and what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import encoded_examples, text_generation
from peftcore_cli.tasks.registered import find
from support.measured import measured


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama)


def test_a_long_text_is_divided_and_nothing_lost(tokenizer: Any) -> None:
    ids = tokenizer("the film is good and the story is bad")["input_ids"] + [tokenizer.eos_token_id]
    found = find("causal-lm").encode([Row("f:1", "the film is good and the story is bad")], tokenizer, 4)
    assert found.truncated == 1
    assert [example["input_ids"] for example in found.examples] == [ids[0:4], ids[4:8], ids[8:10]]
    assert all(example["labels"] == example["input_ids"] for example in found.examples)


def test_of_a_long_prompt_the_beginning_is_dropped(tokenizer: Any) -> None:
    row = Row("f:1", "the film is good and the story", completion="is bad")
    (example,) = find("causal-lm").encode([row], tokenizer, 5).examples
    answer = [*tokenizer("is bad")["input_ids"], tokenizer.eos_token_id]
    assert example["input_ids"] == tokenizer("the story")["input_ids"] + answer
    assert example["labels"] == [-100, -100, *answer]


def test_an_empty_prompt_begins_with_a_special_token(tokenizer: Any) -> None:
    (example,) = find("causal-lm").encode([Row("f:1", "", completion="bad")], tokenizer, 8).examples
    assert example["input_ids"][0] == tokenizer.bos_token_id and example["labels"][0] == -100


def test_measure_does_not_depend_on_batches(llama: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama).train()
    rows = [
        Row(f"f:{i}", text) for i, text in enumerate(("the film is", "a very very dull story", "no", "fun and heart"))
    ]
    examples = find("causal-lm").encode(rows, tokenizer, 16).examples
    before = torch.get_rng_state()
    found = [measured("causal-lm", model, examples, tokenizer, batch_size) for batch_size in (1, 2, 4)]
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert [metrics.count for metrics in found] == [3 + 5 + 1 + 3] * 3
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5) == pytest.approx(found[2].loss, rel=1e-5)


def test_measure_computes_no_logits(llama: Path, tokenizer: Any) -> None:
    """A training step may have none either, and its memory is what the prediction counts."""
    from transformers import AutoModelForCausalLM

    model, rows = AutoModelForCausalLM.from_pretrained(llama), []
    model.register_forward_hook(lambda module, args, output: rows.append(output.logits.shape[1]))
    examples = find("causal-lm").encode([Row("f:1", "the film is good")], tokenizer, 16).examples
    found = measured("causal-lm", model, examples, tokenizer)
    with torch.no_grad():
        wanted = model(**find("causal-lm").collator(tokenizer)(examples))
    assert rows[-2:] == [0, len(examples[0]["input_ids"])]
    assert found.loss == pytest.approx(float(wanted.loss), rel=1e-5)


def test_classes_are_cut_at_the_end(tokenizer: Any) -> None:
    rows = [Row("f:1", "the film is good", label="b"), Row("f:2", "bad", label="a")]
    found = find("classification").encode(rows, tokenizer, 3, ("a", "b"))
    assert found.truncated == 1 and [example["labels"] for example in found.examples] == [1, 0]
    batch = find("causal-lm").collator(tokenizer)(found.examples)
    assert batch["input_ids"].tolist() == [
        tokenizer("the film is")["input_ids"],
        [*tokenizer("bad")["input_ids"], 0, 0],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and batch["labels"].tolist() == [1, 0]


def test_generation_leaves_the_random_state_alone(llama: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    before = torch.get_rng_state()
    texts = [
        text_generation.generate_text(model, tokenizer, "the film", max_new_tokens=8, temperature=2.0, seed=s)
        for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_batches_of_so_many_examples_and_tokens() -> None:
    examples = [{"input_ids": [0] * length, "labels": []} for length in (3, 9, 2, 2, 5, 4)]

    def lengths(**limits: int) -> list[list[int]]:
        return [[len(each["input_ids"]) for each in batch] for batch in encoded_examples.batches_of(examples, **limits)]

    assert lengths(batch_size=4) == [[2, 2, 3, 4], [5, 9]]
    assert lengths(batch_size=4, tokens=8) == [[2, 2], [3, 4], [5], [9]]  # the last has more alone
    assert [*encoded_examples.batches_of([], 4)] == []
