"""Preference pairs: how files have them, how they become tokens, and DPO against the frozen base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.data import row_reading
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import conversations
from peftcore_cli.tasks.registered import find
from support.commands import Run, write_jsonl
from support.measured import measured

from peftcore import PeftcoreError

ASKED = [{"role": "user", "content": "is it good"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("it is very good", "no"))


def read(folder: Path, fields: dict[str, Any]) -> Row:
    (row,) = row_reading.read_rows(write_jsonl(folder / "rows.jsonl", [fields]), "dpo")
    return row


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama)


def test_how_files_have_them(tmp_path: Path) -> None:
    found = read(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert (found.text, found.completion, found.rejected) == ("a", "b", "c")
    explicit = read(tmp_path, {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]})
    implicit = read(tmp_path, {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]})
    assert explicit == implicit
    assert (explicit.messages, explicit.completion, explicit.rejected) == (ASKED, [GOOD], [BAD])
    assert row_reading.guess_task(tmp_path / "rows.jsonl") == "dpo"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "dpo needs the keys prompt/chosen/rejected, found prompt, chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' must be text, found 3"),
        ({"chosen": "b", "rejected": "c"}, "'prompt' must be text, found null"),
        ({"prompt": ASKED, "chosen": [GOOD], "rejected": "c"}, "'rejected' must be a list of messages, found str"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "'chosen' and 'rejected' begin with different prompts"),
        (
            {"prompt": ASKED, "chosen": [GOOD, *ASKED], "rejected": [BAD]},
            "'chosen' must be a single assistant answer",
        ),
        (
            {"chosen": [*ASKED, GOOD], "rejected": ASKED},
            "'rejected' must be a single assistant answer .* found nothing",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=rf"rows.jsonl:1: {message}"):
        read(tmp_path, fields)


def test_tokens_of_texts_end_where_an_answer_ends(tmp_path: Path, tokenizer: Any) -> None:
    row = read(tmp_path, {"prompt": "the film is", "chosen": "very good", "rejected": "bad"})
    (example,) = find("dpo").encode([row], tokenizer, 32).examples
    ids = {
        name: tokenizer(text)["input_ids"] for name, text in (("p", "the film is"), ("c", "very good"), ("r", "bad"))
    }
    end = [tokenizer.eos_token_id]
    assert example == {"prompt_ids": ids["p"], "chosen_ids": ids["c"] + end, "rejected_ids": ids["r"] + end}
    short = find("dpo").encode([row], tokenizer, 4)
    assert short.truncated == 1 and short.examples[0]["prompt_ids"] == ids["p"][2:]
    assert find("dpo").lengths(short.examples) == [4]


def test_answers_that_differ_beyond_the_length_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        read(tmp_path, {"prompt": "the film is", "chosen": "very good", "rejected": "bad"}),
        read(tmp_path, {"prompt": "the", "chosen": "a a a a a good", "rejected": "a a a a a bad"}),
    ]
    found = find("dpo").encode(rows, tokenizer, 4)
    assert (len(found.examples), found.truncated, found.left_out) == (1, 2, 1)
    with pytest.raises(PeftcoreError, match="no two answers differ within 4 tokens"):
        find("dpo").encode(rows[1:], tokenizer, 4)
    with pytest.raises(PeftcoreError, match="'chosen' and 'rejected' have the same tokens"):
        find("dpo").encode([read(tmp_path, {"prompt": "the", "chosen": "x", "rejected": "y"})], tokenizer, 8)


def test_tokens_of_conversations_are_those_that_are_learned_otherwise(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ '<s> ' + m['content'] + ' </s> the ' }}{% endfor %}"
    row = read(tmp_path, {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]})
    (example,) = find("dpo").encode([row], tokenizer, 32).examples
    for answer, name in ((GOOD, "chosen_ids"), (BAD, "rejected_ids")):
        alone = Row("f:1", "", messages=[*ASKED, answer], learned_from=1)
        (learned,) = conversations.encode(alone, tokenizer)
        wanted = [label for label in learned["labels"] if label != -100]
        whole = example["prompt_ids"] + example[name]
        assert whole == learned["input_ids"][: len(whole)] and whole[-len(wanted) :] == wanted
        assert tokenizer.decode(whole).endswith("</s>"), "not what the template writes behind the answer"


def test_loss_and_margin_by_hand(llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import peftcore

    model = AutoModelForCausalLM.from_pretrained(llama)
    rows = [
        read(tmp_path, {"prompt": "the film is", "chosen": "very good", "rejected": "bad"}),
        read(tmp_path, {"prompt": "a", "chosen": "story", "rejected": "no heart and no fun"}),
    ]
    examples = find("dpo").encode(rows, tokenizer, 32).examples
    assert measured("dpo", model, examples, tokenizer).loss == pytest.approx(math.log(2))
    base = [chances(model, each) for each in examples]
    torch.manual_seed(1)
    peftcore.apply(model, "lora", r=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    margins = [
        0.5 * ((mine[0] - its[0]) - (mine[1] - its[1]))
        for mine, its in zip([chances(model, each) for each in examples], base, strict=True)
    ]
    for size in (1, 2):
        found = measured("dpo", model, examples, tokenizer, size, beta=0.5)
        assert found.loss == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 2, rel=1e-4)
        assert found.figures["margin"] == pytest.approx(sum(margins) / 2, rel=1e-4)
        assert found.figures["preference_accuracy"] == sum(m > 0 for m in margins) / 2


@torch.no_grad()
def chances(model: Any, example: dict[str, list[int]]) -> list[float]:
    """log p of the chosen and of the rejected answer, token by token."""
    found = []
    for name in ("chosen_ids", "rejected_ids"):
        ids = example["prompt_ids"] + example[name]
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(example["prompt_ids"]), len(ids))))
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls what transformers has deprecated
def test_dpo_end_to_end(run: Run, llama: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"the {word} is", "chosen": "very good", "rejected": "dull and bad"}
        for word in ("film", "story", "heart", "fun") * 2
    ]
    path, output = write_jsonl(tmp_path / "pairs.jsonl", rows), tmp_path / "run"
    arguments = ("-m", llama, "-d", path, "--eval-data", path, "--method", "lora", "--set", "r=4", "--lr", "0.02")
    run("train", *arguments, "-o", output, "--steps", 8, "--batch-size", 4, "--beta", "0.2", "--save-every", 4)
    found = json.loads((output / "result.json").read_text())
    assert found["before"] == {"loss": pytest.approx(math.log(2)), "preference_accuracy": 0.0, "margin": 0.0}
    assert (
        found["after"]["loss"] < 0.3 and found["after"]["preference_accuracy"] == 1.0 and found["after"]["margin"] > 1
    )
    state = json.loads((output / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    first = next(entry for entry in state["log_history"] if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5), "the reference is the base"
    shown = run("eval", output, "-d", path).output
    assert f"{found['after']['loss']:.4f}" in shown and "preference accuracy" in shown
    run("generate", output, "-p", "the film is", "--max-new-tokens", 2)
    wrong = run("train", *arguments, "-o", tmp_path / "no", "--pack", code=1).output
    assert "--pack only works with causal-lm (the task is dpo)" in wrong


def test_beta_is_of_dpo(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    error = run("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--method", "lora", "--beta", 1, code=1)
    tasks = "--beta only works with dpo, image-dpo, kto, orpo and grpo"
    assert f"{tasks} and must be above 0 (grpo also allows 0), found 1 for causal-lm" in error.output
