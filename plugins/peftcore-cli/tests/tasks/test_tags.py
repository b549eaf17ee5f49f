"""`--task tags`: words with tags, the token that has a word's tag, F1 of entities, and a run from end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases.adapter_folders import AdapterTask
from peftcore_cli.data import row_reading
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import row_labels, tags
from peftcore_cli.tasks.registered import find
from support.commands import Run, write_jsonl
from support.measured import measured

from peftcore import PeftcoreError

METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu")
NAMES = ("B-A", "I-A", "O")
ROWS = [
    {"tokens": ["the", word, "story", "is", "bad"], "tags": ["O", "B-A", "I-A", "O", "O"]}
    for word in ("good", "dull", "bright", "very")
] + [{"tokens": ["it", "was", "fun"], "tags": ["O", "O", "B-A"]}] * 2


@pytest.fixture
def letters() -> Any:
    """A tokenizer with a token for each letter, after a special one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<s>")


def read(folder: Path, fields: dict[str, Any]) -> Row:
    (row,) = row_reading.read_rows(write_jsonl(folder / "rows.jsonl", [fields]), "tags")
    return row


def test_the_first_token_of_a_word_has_its_tag(tmp_path: Path, letters: Any) -> None:
    row = read(tmp_path, {"tokens": ["ab", "c", "def"], "tags": ["O", "B-A", "I-A"]})
    assert (row.words, row.label) == (("ab", "c", "def"), ("O", "B-A", "I-A"))
    assert row_reading.guess_task(tmp_path / "rows.jsonl") == "tags"
    (example,) = find("tags").encode([row], letters, 16, NAMES).examples
    assert example == {"input_ids": [0, 1, 2, 3, 4, 5, 6], "labels": [-100, 2, -100, 0, 1, -100, -100]}
    short = find("tags").encode([row], letters, 4, NAMES)
    assert short.truncated == 1 and short.examples[0]["labels"] == [-100, 2, -100, 0]


def test_numbers_are_names_and_other_keys(tmp_path: Path) -> None:
    row = read(tmp_path, {"tokens": ["a", "b"], "ner_tags": [0, 3]})
    assert row.label == ("0", "3") and row_labels.labels_of([row]) == ["0", "3"]


def test_counts_are_those_of_the_words(tmp_path: Path) -> None:
    row = read(tmp_path, {"tokens": ["a", "nan", "b", "c"], "tags": ["O", " B-A", "B-A ", "B-A"]})
    assert row_labels.counts_of([row]) == "labels: B-A (3), O (1). 75.0% of the tags have the most frequent label"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": ["a"], "tag": ["O"]}, "tags needs the keys tokens/tags, found tokens, tag"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "'tokens' has 2 words, but 'tags' has 1 tags"),
        ({"tokens": "a b", "tags": ["O"]}, "'tokens' must be a list of words without spaces, found \"a b\""),
        ({"tokens": ["a b"], "tags": ["O"]}, "'tokens' must be a list of words without spaces"),
        ({"tokens": ["nan"], "tags": ["NaN"]}, "'tags' is NaN, which usually stands for a missing value"),
    ],
)
def test_wrong_rows(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=rf"rows.jsonl:1: {message}"):
        read(tmp_path, fields)


def test_unknown_tags_and_a_single_one(tmp_path: Path, letters: Any) -> None:
    row = read(tmp_path, {"tokens": ["a", "b"], "tags": ["B-B", "B-B"]})
    with pytest.raises(PeftcoreError, match=r"rows.jsonl:1: unknown tag 'B-B' \(nearest: 'B-A'"):
        find("tags").encode([row], letters, 8, NAMES)
    with pytest.raises(PeftcoreError, match="every word has the tag"):
        row_labels.labels_of([row])


@pytest.mark.parametrize(
    ("sequence", "wanted"),
    [
        ("O B-A I-A O", [("A", 1, 3)]),
        ("B-A B-A I-B", [("A", 0, 1), ("A", 1, 2), ("B", 2, 3)]),
        ("I-A I-A O I-B", [("A", 0, 2), ("B", 3, 4)]),
        ("O O", []),
        ("B-A I-A E-A S-A S-A", [("A", 0, 3), ("A", 3, 4), ("A", 4, 5)]),
        ("E-A E-A I-A S-B I-B", [("A", 0, 1), ("A", 1, 2), ("A", 2, 3), ("B", 3, 4), ("B", 4, 5)]),
        ("B-A E-B I-A-C I-A-C", [("A", 0, 1), ("B", 1, 2), ("A-C", 2, 4)]),
    ],
)
def test_entities(sequence: str, wanted: list[tuple[str, int, int]]) -> None:
    assert list(tags.entities(sequence.split())) == wanted


def test_entity_f1() -> None:
    answers = [torch.tensor([2, 0, 1]), torch.tensor([0, 2])]  # one right; one where there is none
    wanted = [torch.tensor([2, 0, 1]), torch.tensor([2, 2])]
    assert tags.entity_f1(answers, wanted, NAMES) == pytest.approx(2 / 3)
    only_inside = tags.figures(answers, wanted, ("I-A", "I-B", "O"))  # as in the files of CoNLL 2003
    assert only_inside.figures["entity_f1"] == pytest.approx(4 / 5)


def test_measure_by_hand(bert: Path) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(bert, id2label=dict(enumerate(NAMES))).eval()
    rows = [Row("f:1", "", label=tuple(row["tags"]), words=tuple(row["tokens"])) for row in (ROWS[0], ROWS[4])]
    examples = find("tags").encode(rows, tokenizer, 16, NAMES).examples
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([each["input_ids"]])).logits[0] for each in examples])
    wanted = torch.tensor([NAMES.index(tag) for row in rows for tag in row.label])  # a token for each word
    for size in (1, 2):
        found = measured("tags", model, examples, tokenizer, size, labels=NAMES)
        assert found.count == 8
        assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, wanted)), rel=1e-5)
        assert found.figures["accuracy"] == pytest.approx(float((logits.argmax(-1) == wanted).double().mean()))


def test_end_to_end(run: Run, bert: Path, tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "words.jsonl", ROWS), tmp_path / "run"
    arguments = ("-m", bert, "-d", path, "--eval-data", path, *METHOD, "--lr", "0.02", "--batch-size", 6)
    text = run(
        "train", *arguments, "-o", output, "--steps", 15, "--eval-every", 5, "--metric", "entity_f1", "--load-best"
    )
    found = json.loads((output / "result.json").read_text())
    assert found["after"]["entity_f1"] > 0.9 > found["before"]["entity_f1"] and found["best"]["metric"] == "entity_f1"
    assert "entity F1" in text.output and found["labels"] == list(NAMES)
    shown = run("eval", output, "-d", path).output
    assert f"{found['after']['loss']:.4f}" in shown and f"{found['before']['loss']:.4f}" in shown
    answer = run("generate", output, "-p", "the good story is bad").output.strip()
    assert re.fullmatch(r"the/\S+ good/\S+ story/\S+ is/\S+ bad/\S+", answer)
    merged = tmp_path / "merged"
    run("merge", output, "--output", merged)
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    model = AutoModelForTokenClassification.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert find("tags").answer(model, tokenizer, "the good story is bad", AdapterTask("tags", 16, NAMES)) == answer


def test_the_loss_of_small_batches_is_not_a_sum(run: Run, bert: Path, tmp_path: Path) -> None:
    """The loss of a tagger is a mean over its batch, which Trainer has to divide by the number of batches."""
    path = write_jsonl(tmp_path / "words.jsonl", [ROWS[0], ROWS[1]] * 2)
    arguments = ("--batch-size", 1, "--grad-accum", 4, "--steps", 1, "--eval-data", path, "-o", tmp_path / "run")
    run("train", "-m", bert, "-d", path, *METHOD, *arguments)
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-1" / "trainer_state.json").read_text())
    loss = next(entry["loss"] for entry in state["log_history"] if "loss" in entry)
    before = json.loads((tmp_path / "run" / "result.json").read_text())["before"]["loss"]
    assert loss == pytest.approx(before, rel=0.3)  # dropout


def test_no_entities_no_f1(run: Run, bert: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["it", "was", "fun"], "tags": ["PRON", "VERB", "ADJ"]}] * 4
    path = write_jsonl(tmp_path / "words.jsonl", rows)
    arguments = ("-m", bert, "-d", path, "-o", tmp_path / "run", *METHOD, "--steps", 1, "--load-best")
    error = run("train", *arguments, "--metric", "entity_f1", code=1).output
    assert "--metric entity_f1 is not available for these examples. Pass one of loss, accuracy, macro_f1" in error


def test_batches_pad_tags(bert: Path) -> None:
    from transformers import AutoTokenizer

    batch = find("tags").collator(AutoTokenizer.from_pretrained(bert))(
        [{"input_ids": [4, 5], "labels": [0, 1]}, {"input_ids": [4], "labels": [2]}]
    )
    assert batch["labels"].tolist() == [[0, 1], [2, -100]]
