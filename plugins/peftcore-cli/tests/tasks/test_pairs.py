"""`--task pairs`: texts that belong together, their losses as sentence-transformers defines them, and vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.bases.adapter_folders import AdapterTask, adapter_task
from peftcore_cli.data import row_reading
from peftcore_cli.tasks import encoded_examples, pairs
from peftcore_cli.tasks.registered import find
from peftcore_cli.training.sampler import LengthGroupedSampler
from support.commands import Run, write_jsonl
from support.measured import measured
from torch.nn import functional as F

import peftcore
from peftcore import PeftcoreError

PAIRS: list[dict[str, Any]] = [
    {"anchor": f"the film is {word}", "positive": f"{word} story"} for word in ("good", "bad", "dull", "bright", "fun")
]
TRIPLETS = [{**row, "negative": f"not {row['positive']}"} for row in PAIRS]
SCORED = [
    {"sentence1": row["anchor"], "sentence2": row["positive"], "score": score}
    for row, score in zip(PAIRS, (1, 0.5, 0, -0.5, 0.75), strict=True)
]
KINDS = {"pairs": PAIRS, "triplets": TRIPLETS, "scored": SCORED}


def examples_of(folder: Path, rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    found = row_reading.read_rows(write_jsonl(folder / "pairs.jsonl", rows), "pairs")
    return find("pairs").encode(found, tokenizer, 16).examples


def their_loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Return the loss of sentence-transformers' documentation, text by text.

    MultipleNegativesRankingLoss with its scale of 20, or CosineSimilarityLoss, after mean pooling.
    """

    def vector(text: str) -> torch.Tensor:
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    texts = [[text for text in row.values() if isinstance(text, str)] for row in rows]
    columns = [[vector(text) for text in column] for column in zip(*texts, strict=True)]
    if "score" in rows[0]:
        cosines = torch.stack([F.cosine_similarity(a, b, dim=0) for a, b in zip(columns[0], columns[1], strict=True)])
        return F.mse_loss(cosines, torch.tensor([float(row["score"]) for row in rows]))
    candidates = [each for column in columns[1:] for each in column]
    scores = torch.stack([torch.stack([20 * F.cosine_similarity(a, c, dim=0) for c in candidates]) for a in columns[0]])
    return F.cross_entropy(scores, torch.arange(len(rows)))


def test_rows(tmp_path: Path) -> None:
    for name, rows in KINDS.items():
        file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        assert row_reading.guess_task([str(file)]) == "pairs"
        row = row_reading.read_rows(file, "pairs")[1]
        assert (row.text, row.pair) == ("the film is bad", "bad story")
        assert row.negative == ("not bad story" if name == "triplets" else None)
        assert row.label == (0.5 if name == "scored" else None)
    labelled = write_jsonl(tmp_path / "labelled.jsonl", [{"sentence1": "a", "sentence2": "b", "label": "same"}])
    assert row_reading.guess_task([str(labelled)]) == "classification"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"anchor": "a"}], "needs the keys anchor/positive"),
        ([{"anchor": "a", "positive": " "}], "'positive' is empty"),
        ([{"anchor": "a", "positive": 3}], "'positive' must be text"),
        ([{"sentence1": "a", "sentence2": "b", "score": 4.5}], "from -1 to 1.*Divide"),
        ([PAIRS[0], TRIPLETS[1]], "Use one format per file"),
        ([PAIRS[0], SCORED[1]], "Use one format per file"),
    ],
)
def test_wrong_rows(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        row_reading.read_rows(write_jsonl(tmp_path / "rows.jsonl", rows), "pairs")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_sentence_transformers(kind: str, bert: Path, tmp_path: Path) -> None:
    tokenizer, model = models.load_tokenizer(str(bert)), models.load_model(str(bert), "pairs", device="cpu")
    examples = examples_of(tmp_path, KINDS[kind], tokenizer)
    found = measured("pairs", model, examples, tokenizer, 2, pooling="mean")
    with torch.no_grad():
        assert found.loss == pytest.approx(float(their_loss(model, tokenizer, KINDS[kind])), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_methods_see_the_loss_of_their_first_batches(kind: str, bert: Path, tmp_path: Path) -> None:
    tokenizer, model = models.load_tokenizer(str(bert)), models.load_model(str(bert), "pairs", device="cpu")
    batch = find("pairs").collate(examples_of(tmp_path, KINDS[kind], tokenizer), tokenizer)
    with find("pairs").with_loss(model, AdapterTask("pairs", 512, pooling="mean")), torch.no_grad():
        found = model(**batch).loss
        assert not hasattr(model(input_ids=batch["input_ids"]), "loss")
    with torch.no_grad():
        assert float(found) == pytest.approx(float(their_loss(model, tokenizer, KINDS[kind])), rel=1e-4)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_positive_without_another_text_is_refused(bert: Path, tmp_path: Path, run: Run) -> None:
    tokenizer = models.load_tokenizer(str(bert))
    pairs, triplets, scored = (examples_of(tmp_path, rows, tokenizer) for rows in KINDS.values())
    for fine, size in ((pairs, 2), (triplets, 1), (scored, 1), (triplets[:1], None), (scored[:1], None)):
        find("pairs").check_examples(fine, "training", size)
    with pytest.raises(PeftcoreError, match="so --batch-size 1 needs rows with a negative"):
        find("pairs").check_examples(pairs, "training", 1)
    for alone in (pairs[:1], [pairs[0], pairs[0]]):
        with pytest.raises(PeftcoreError, match=r"all \d held-out examples have the same positive.*--holdout 2"):
            find("pairs").check_examples(alone, "held-out")
    file = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    arguments = ("train", "-m", bert, "-d", file, "--method", "lora", "-o", tmp_path / "run", "--device", "cpu")
    assert "all 1 held-out examples have the same positive" in run(*arguments, code=1).output


def test_candidates_with_the_text_of_the_positive_are_no_negatives(bert: Path, tmp_path: Path) -> None:
    tokenizer, model = models.load_tokenizer(str(bert)), models.load_model(str(bert), "pairs", device="cpu")
    twice = [PAIRS[0], {"anchor": "a good film", "positive": PAIRS[0]["positive"]}]
    examples = examples_of(tmp_path, twice, tokenizer)
    assert measured("pairs", model, examples, tokenizer, pooling="mean").loss == pytest.approx(0, abs=1e-6)
    assert find("pairs").collate(examples, tokenizer)["same"].tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_ignore_padding(pooling: str, bert: Path) -> None:
    tokenizer, model = models.load_tokenizer(str(bert)), models.load_model(str(bert), "pairs", device="cpu")
    texts = tokenizer(["the film is very good", "bad", "it was"])["input_ids"]
    together = pairs.embed(model, texts, 0, pooling, 3)
    alone = torch.cat([pairs.embed(model, [ids], 0, pooling) for ids in texts])
    assert torch.allclose(together, alone, atol=1e-5) and together.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    states = model(torch.tensor([texts[0]])).last_hidden_state[0].detach()
    wanted = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    assert torch.allclose(together[0], F.normalize(wanted, dim=0), atol=1e-5)


def test_figures() -> None:
    class Fixed(torch.nn.Module):
        """A model whose hidden state is the one-hot vector of a token."""

        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.eye(6))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return type("Output", (), {"last_hidden_state": self.table[input_ids]})

    tokenizer: Any = type("Tokenizer", (), {"pad_token_id": 0})
    right = [{"texts": [[1], [1]], "labels": None}, {"texts": [[2], [2]], "labels": None}]
    found = measured("pairs", Fixed(), right, tokenizer, pooling="mean").figures
    assert found == {"recall_at_1": 1.0, "mrr": 1.0}
    wrong = [{"texts": [[1], [2]], "labels": None}, {"texts": [[2], [1]], "labels": None}]
    assert measured("pairs", Fixed(), wrong, tokenizer, pooling="mean").figures == {"recall_at_1": 0.0, "mrr": 0.5}


@pytest.mark.parametrize(
    ("files", "pooling"),
    [
        ({}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_pooling_is_the_bases(tmp_path: Path, files: dict[str, Any], pooling: str) -> None:
    (tmp_path / "1_Pooling").mkdir()
    if files:
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(files))
    assert pairs.pooling_of(str(tmp_path)) == pooling
    assert pairs.pooling_of(str(tmp_path), "cls") == "cls"
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(PeftcoreError, match=r"uses max_tokens pooling.*--pooling mean"):
        pairs.pooling_of(str(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2"}]))
    with pytest.raises(PeftcoreError, match="module Dense"):
        pairs.pooling_of(str(tmp_path))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_losses(kind: str, bert: Path, tmp_path: Path, run: Run) -> None:
    """Losses of the command are those of a plain loop with the losses text by text."""
    from transformers import AutoModel

    rows, dry = KINDS[kind], tmp_path / "dry"
    without: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    AutoModel.from_pretrained(bert, **without).save_pretrained(dry)
    models.load_tokenizer(str(bert)).save_pretrained(dry)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ("--method", "lora", "--set", "r=4", "--device", "cpu", "--steps", "3", "--lr", "1e-3", "--warmup", "0")
    more = ("--scheduler", "constant", "--batch-size", "5", "--eval-data", file, "--output", tmp_path / "run")
    run("train", "--model", dry, "--data", file, *options, *more)
    log = json.loads(next((tmp_path / "run" / "checkpoints").glob("*-3/trainer_state.json")).read_text())["log_history"]
    ours = [each["loss"] for each in log if "loss" in each]

    torch.manual_seed(0)
    tokenizer, model = models.load_tokenizer(str(dry)), models.load_model(str(dry), "pairs", device="cpu")
    peftcore.apply(model, "lora", r=4)
    optimizer = torch.optim.AdamW(peftcore.parameter_groups(model, lr=1e-3), weight_decay=0.0)
    examples = examples_of(tmp_path, rows, tokenizer)
    order = list(LengthGroupedSampler([encoded_examples.length(each) for each in examples], 5, 0))
    theirs = []
    for _ in range(3):
        loss = their_loss(model, tokenizer, [rows[i] for i in order])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        theirs.append(float(loss.detach()))
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 3


@pytest.mark.nightly
def test_training_evaluating_and_vectors(bert: Path, tmp_path: Path, run: Run) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", TRIPLETS)
    options = ("--method", "lora", "--set", "r=4", "--device", "cpu", "--steps", "12", "--lr", "1e-2", "--pooling")
    run("train", "-m", bert, "--data", file, *options, "cls", "--eval-data", file, "--output", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["after"]["loss"] < result["before"]["loss"] and 0 <= result["after"]["recall_at_1"] <= 1
    task = adapter_task(tmp_path / "run" / "adapter")
    assert (task.task, task.pooling) == ("pairs", "cls")
    said = run("eval", tmp_path / "run", "--data", file).output
    assert f"{result['after']['loss']:.4f}" in said and "recall@1" in said
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "the film is good"}, {"text": "bad"}])
    run("predict", tmp_path / "run", "--data", texts, "--output", tmp_path / "vectors.jsonl")
    found = [json.loads(line) for line in (tmp_path / "vectors.jsonl").read_text().splitlines()]
    tokenizer, model = models.load_tokenizer(str(bert)), models.load_model(str(bert), "pairs", device="cpu")
    peftcore.load(model, tmp_path / "run" / "adapter")
    wanted = pairs.embed(model, tokenizer(["the film is good"])["input_ids"], 0, "cls")[0]
    assert found[0]["text"] == "the film is good"
    assert found[0]["embedding"] == pytest.approx(wanted.tolist(), abs=1e-5)
    run("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert pairs.pooling_of(str(tmp_path / "merged")) == "cls"
    merged = pairs.embed(
        models.load_model(str(tmp_path / "merged"), "pairs", device="cpu"),
        tokenizer(["the film is good"])["input_ids"],
        0,
        "cls",
    )
    assert found[0]["embedding"] == pytest.approx(merged[0].tolist(), abs=1e-4)
    for wrong in (("generate", "--prompt", "a"), ("chat",)):
        assert "computes text embeddings" in run(wrong[0], tmp_path / "run", *wrong[1:], code=1).output
    again = ("train", "--adapter", tmp_path / "run", "--data", file, "--output", tmp_path / "more", "--eval-data", file)
    run(*again, "--steps", "1", "--device", "cpu")
    assert json.loads((tmp_path / "more" / "adapter" / "peftcore_task.json").read_text())["pooling"] == "cls"
    assert "cannot change the pooling of an existing adapter" in run(*again, "--pooling", "mean", code=1).output
    other = ("train", "--model", bert, "--data", file, "--method", "lora", "--output", tmp_path / "other")
    assert "--pooling only works with pairs" in run(*other, "--task", "causal-lm", "--pooling", "mean", code=1).output
