"""`train`, and what its output is good for: `eval`, `generate`, `merge` and `info`."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.data import data_files
from safetensors.torch import load_file
from support import tiny
from support.commands import Run, write_jsonl

import peftcore

METHOD = ("--method", "lora", "--set", "r=4", "--set", "lora_alpha=8")
STEPS = ("--steps", 6, "--batch-size", 4, "--lr", "0.02", "--save-every", 2, "--eval-every", 3)


def result_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


@pytest.fixture
def writer(run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a finished language-model run."""
    output = tmp_path / "private=1" / "writer"
    data = ("-d", reviews, "--eval-data", reviews)
    arguments = ("train", "-m", llama, *data, f"--output={output}", *METHOD, *STEPS, "--epochs", 9)
    monkeypatch.setattr("sys.argv", ["peftcore", *map(str, arguments)])
    run(*arguments)
    return output


def test_losses_without_logits(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    found = []
    for name in ("off", "on", "auto"):
        arguments = ("-m", llama, "-d", reviews, "-o", tmp_path / name, *METHOD, *STEPS, "--without-logits", name)
        said = run("train", *arguments).output
        assert ("computed without the logits" in said) == (name != "off")
        found.append(result_of(tmp_path / name)["after"]["loss"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)
    assert 'without_logits = "on"' in (tmp_path / "on" / "run.toml").read_text()


def test_fused_operators(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    found = []
    for name in ("off", "on", "auto"):
        arguments = ("-m", llama, "-d", reviews, "-o", tmp_path / name, *METHOD, *STEPS, "--fuse", name)
        said = run("train", *arguments).output
        assert ("(--fuse auto)" in said) == (name == "auto")
        assert ("5 x RMSNorm, 2 x attention, 2 x gated MLP" in said) == (name != "off")
        found.append(result_of(tmp_path / name)["after"]["loss"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


@pytest.mark.pictures
def test_language_model_end_to_end(run: Run, writer: Path, llama: Path, reviews: Path, tmp_path: Path) -> None:
    found = result_of(writer)
    assert found["after"]["loss"] < 0.7 * found["before"]["loss"]
    assert found["steps"] == 6 and found["eval_rows"] == 14
    assert {"imports", "data", "forecast", "loading", "evaluation", "training", "other"} == found["spent"].keys()
    assert found["adapter_bytes"] < 60_000 and found["tokens_per_second"] > 0 and found["peak"]["memory"] > 1e7

    report = (writer / "report.html").read_text()
    picture = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", report)[1])
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert f"peftcore generate {writer / 'adapter'}" in report and f"peftcore merge {writer / 'adapter'}" in report
    assert f"{found['before']['loss']:.4f}" in report and f"{found['after']['loss']:.4f}" in report
    for made_with in (torch.__version__, "transformers", "processor", "peftcore ", "SIMD level"):
        assert made_with in report
    assert "://" not in report.replace(str(writer), ""), "the report must need nothing from elsewhere"

    evaluated = run("eval", writer, "-d", reviews).output
    assert f"{found['before']['loss']:.4f}" in evaluated and f"{found['after']['loss']:.4f}" in evaluated

    both = run("generate", writer / "adapter", "-p", "the film is good", "--compare").output
    base = run("generate", "--model", llama, "-p", "the film is good").output
    assert base.strip() in both
    alone = run("generate", writer / "adapter", "-p", "the film is good").output
    assert alone.strip() in both and alone != base

    run("merge", writer / "adapter", "--output", tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model = peftcore.load(AutoModelForCausalLM.from_pretrained(llama), writer / "adapter")
    tokens = torch.tensor([[1, 4, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, model.eval()(tokens).logits, atol=1e-5, rtol=1e-5)
    run("merge", writer / "adapter", "--output", tmp_path / "parts", "--shard-size", "10KB")
    weights = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())["weight_map"]
    assert weights.keys() == load_file(llama / "model.safetensors").keys() and len(set(weights.values())) > 2
    assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in (tmp_path / "parts").iterdir()}
    parts = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters(), merged.parameters(), strict=True))
    refused = run("merge", writer / "adapter", "--output", tmp_path / "merged", code=1).output
    assert "exists already" in refused

    about = run("info", writer).output  # the run's folder, in which the adapter lies
    assert "LORA" in about and "CAUSAL_LM" in about and str(llama)[:20] in about


def test_only_the_completion_is_learned(run: Run, llama: Path, tmp_path: Path) -> None:
    """The loss of the base over completions, by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "the film is", "completion": "very dull"}])
    output = tmp_path / "run"
    run("train", "-m", llama, "-d", data, "--eval-data", data, "-o", output, *METHOD, "--steps", 1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    tokens = torch.tensor([tokenizer("the film is very dull")["input_ids"] + [tokenizer.eos_token_id]])
    with torch.no_grad():
        chances = model(tokens).logits.log_softmax(-1)
    wanted = -sum(chances[0, i - 1, tokens[0, i]] for i in (3, 4, 5)) / 3
    assert result_of(output)["before"]["loss"] == pytest.approx(float(wanted), abs=1e-5)


def test_the_model_card_says_what_was_trained(writer: Path) -> None:
    card = (writer / "adapter" / "README.md").read_text()
    section = card.partition("## Training\n")[2]
    loss = result_of(writer)["after"]["loss"]
    assert "| task | causal-lm |" in section and "| steps | 6 |" in section and f", {loss:.4f} after |" in section
    assert "```sh\npeftcore train" in section and "--output=writer" in section
    assert "private" not in card and str(writer.parents[1]) not in card


def test_checkpoints_hold_the_adapter_only(writer: Path) -> None:
    folders = sorted((writer / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["checkpoint-4", "checkpoint-6"]
    for folder in folders:
        names = {file.name for file in folder.iterdir()}
        assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "complete.json"} <= names
        assert not {"model.safetensors", "pytorch_model.bin"} & names
        assert all("lora" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_classifier_end_to_end(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ("--batch-size", 4, "--lr", "0.01", "--steps", 40, "--save-every", 40, *METHOD)
    shown = run("train", "-m", bert, "-d", labelled, "--eval-data", labelled, "-o", output, *arguments).output
    assert "labels: up (8), down (8). 50.0% of the examples have the most frequent label" in shown
    found = result_of(output)
    assert found["after"]["accuracy"] == 1.0 and found["before"]["accuracy"] < 1.0
    assert json.loads((output / "adapter" / "peftcore_task.json").read_text())["labels"] == ["down", "up"]
    assert found["baseline"] == ["most frequent label", 0.5] and found["confusion"] == [[8, 0], [0, 8]]
    report = (output / "report.html").read_text()
    assert all(
        shown in report for shown in ("accuracy", "macro F1", "most frequent label", "predicted labels (columns)")
    )
    for word, label in (("good", "up"), ("bad", "down")):
        answer = run("generate", output / "adapter", "-p", f"the story is {word}").output
        assert answer.startswith(label)
    evaluated = run("eval", output / "adapter", "-d", labelled).output
    assert "1.0000" in evaluated and re.search(r"most frequent label +0.5000", evaluated)
    assert re.search(r"down +up *\n *down +8 +0 *\n *up +0 +8", evaluated), evaluated

    strange = write_jsonl(tmp_path / "strange.jsonl", [{"text": "a", "label": "up"}, {"text": "a", "label": "upp"}])
    error = run("eval", output / "adapter", "-d", strange, code=1).output
    assert f"{strange}:2: unknown label 'upp' (nearest: 'up')" in error
    assert "The model's labels are down, up" in error


@pytest.mark.parametrize("seed", [0, 7])
def test_eval_measures_the_base_that_training_began_with(
    run: Run, bert: Path, labelled: Path, tmp_path: Path, seed: int
) -> None:
    """Each load of a classifier's base draws another head, and the figures of both commands are of one."""
    data = ("-d", labelled, "--eval-data", labelled, "--seed", seed)
    run("train", "-m", bert, *data, "-o", tmp_path / "run", *METHOD, "--steps", 1, "--device", "cpu")
    before = result_of(tmp_path / "run")["before"]
    torch.manual_seed(3)
    shown = run("eval", tmp_path / "run", "-d", labelled, "--device", "cpu").output
    row = next(line.split() for line in shown.splitlines() if line.startswith("loss"))
    assert row[1] == f"{before['loss']:.4f}", shown


def test_each_file_is_read_once(
    run: Run, bert: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, plain = list[str](), data_files.READERS[".jsonl"]

    def counted(path: Path) -> Iterator[data_files.Record]:
        read.append(path.name)
        return plain(path)

    monkeypatch.setitem(data_files.READERS, ".jsonl", counted)
    test = tmp_path / "test.jsonl"
    test.write_bytes(labelled.read_bytes())
    run("train", "-m", bert, "-d", labelled, "--eval-data", test, "-o", tmp_path / "run", *METHOD, "--steps", 1)
    assert read == [labelled.name, test.name]


def test_several_files_are_mixed_in_training(run: Run, llama: Path, tmp_path: Path) -> None:
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", 3 * [{"prompt": "the film is", "completion": name}])
        for name in ("good", "bad")
    ]
    data = [word for file in files for word in ("-d", file)]
    out = tmp_path / "run"
    found = run(
        "train", "-m", llama, *data, "--eval-data", files[0], "-o", out, *METHOD, "--steps", 1, "--device", "cpu"
    )
    assert result_of(out)["train_rows"] == 6 and result_of(out)["eval_rows"] == 3
    assert json.loads((out / "run.json").read_text())["data"] == list(map(str, files))
    again = run("train", "--config", out / "run.toml", "-o", tmp_path / "again")
    assert result_of(tmp_path / "again")["after"] == result_of(out)["after"], again.output
    assert "6 examples" in run("eval", out, *data, "--device", "cpu").output, found.output


def test_classifier_from_tsv_on_a_held_out_split(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    data = tmp_path / "rows.tsv"
    data.write_text("label\ttext\n" + "".join(f"{row['label']}\t{row['text']}\n" for row in rows))
    output = tmp_path / "run"
    run("train", "-m", bert, "-d", data, "-o", output, *METHOD, "--steps", 1, "--holdout", "0.25")
    assert (result_of(output)["train_rows"], result_of(output)["eval_rows"]) == (12, 4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_what_peft_wrote(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    """eval and generate take a classifier that PEFT trained: labels come as an option, the base from its config."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(bert), LoraConfig(task_type=TaskType.SEQ_CLS, r=2)
    )
    model.save_pretrained(tmp_path / "theirs")
    assert "PEFT" in run("info", tmp_path / "theirs").output
    assert "accuracy" in run("eval", tmp_path / "theirs", "-d", labelled, "--labels", "down,up").output
    answer = run("generate", tmp_path / "theirs", "-p", "good", "--labels", "down,up").output
    assert re.match(r"(down|up) \(\d", answer)
    error = run("generate", tmp_path / "theirs", "-p", "good", "--labels", "down", code=1).output
    assert "--labels names 1 labels, but the adapter has 2" in error


def test_a_device_that_is_absent_is_named_first(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    error = run("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--device", "cuda", code=1).output
    assert "device 'cuda' is not available" in " ".join(error.split())


@pytest.mark.parametrize("options", [("--precision", "fp16"), ("--streaming", "--holdout", 2)])
def test_a_file_that_is_missing_is_named_before_an_absent_device(
    run: Run, llama: Path, tmp_path: Path, options: tuple[Any, ...]
) -> None:
    arguments = ("-m", llama, "-d", tmp_path / "rows.jsonl", "-o", tmp_path / "run", "--device", "cuda:99", *options)
    error = run("train", *arguments, "--method", "lora", "--task", "causal-lm", code=1).output
    assert "rows.jsonl' does not exist" in " ".join(error.split())


def test_resume_with_other_settings_is_refused(run: Run, writer: Path, llama: Path, reviews: Path) -> None:
    same = ("train", "-m", llama, "-d", reviews, "-o", writer, "--eval-data", reviews, *METHOD, "--epochs", 9)
    error = run(*same, *STEPS, "--seed", 1, "--resume", code=1).output
    assert "has seed=0, but this command has seed=1" in error
    error = run(*same, *STEPS, code=1).output
    assert "already contains a run. Use --resume to continue it, or --overwrite to start again" in error
    run(*same, *STEPS, "--overwrite")


# Settings


def test_gradient_checkpointing_changes_no_value(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    plain, checkpointed = tmp_path / "plain", tmp_path / "checkpointed"
    arguments = ("train", "-m", llama, "-d", reviews, *METHOD, "--steps", 2, "--lr", "0.02")
    run(*arguments, "-o", plain)
    run(*arguments, "-o", checkpointed, "--gradient-checkpointing")
    assert result_of(plain)["after"]["loss"] == pytest.approx(result_of(checkpointed)["after"]["loss"], abs=1e-6)


def test_what_a_method_says_to_training_is_heard(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    """Its term of the loss is shown and acts, and its groups are those of the optimizer."""

    def pull(adapters: Any, config: Any) -> torch.Tensor:
        return torch.stack([(adapter.gain - 3).square() for adapter in adapters.values()]).sum()

    def still(adapters: Any, config: Any, lr: float, decay: float) -> list[dict[str, Any]]:
        first, *_ = adapters.values()
        return [{"params": [first.gain], "lr": 0.0}]

    with tiny.installed(tiny.method("pulled", loss=pull, parameter_groups=still)):
        arguments = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--method", "pulled")
        shown = run(
            *arguments, "--set", "value=1.0", "--steps", 2, "--lr", "0.5", "--warmup", 0, "--grad-accum", 2
        ).output
        assert "extra loss 8.0000" in shown and "extra loss 6.2" in shown  # 4 + 4, and 4 + (1.5 - 3)²
        gains = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sorted(gain.item() for gain in gains.values()) == [1.0, pytest.approx(1.75, abs=0.05)]


def test_first_values_come_from_the_examples_of_training(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    seen = []

    def initialize(model: Any, adapters: Any, config: Any, batches: Any) -> None:
        gradients: dict[str, torch.Tensor] = {}
        peftcore.model.gradients_of(model, [f"{path}.weight" for path in adapters], batches, gradients.__setitem__)
        for path, adapter in adapters.items():
            adapter.gain.add_(gradients[f"{path}.weight"].norm())
        seen.append((sum(len(batch["input_ids"]) for batch in batches), [a.gain.item() for a in adapters.values()]))

    with tiny.installed(tiny.method("drawn", initialize=initialize)):
        for name, more in (("a", ()), ("b", ("--seed", 0))):
            arguments = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / name, "--eval-data", reviews, *more)
            run(
                *arguments, "--method", "drawn", "--set", "value=1.0", "--steps", 1, "--lr", "0.0001", "--batch-size", 4
            )
    assert seen[0] == seen[1] and seen[0][0] == 14 and min(seen[0][1]) > 1
    gains = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
    assert sorted(gain.item() for gain in gains.values()) == pytest.approx(sorted(seen[0][1]), abs=1e-3)


def test_bf16_and_optimizer_passthrough(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ("train", "-m", llama, "-d", reviews, "-o", output, *METHOD, *STEPS)
    run(
        *arguments,
        "--dtype",
        "bf16",
        "--optim",
        "sgd",
        "--scheduler",
        "cosine",
        "--sample",
        "the film",
        "--sample-tokens",
        4,
    )
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}, "an adapter beside a bf16 base is fp32"
    assert [writer for writer, _ in result_of(output)["samples"]] == ["base", "with the adapter"]
    report = (output / "report.html").read_text()
    assert "<td>prompt</td><td>the film</td>" in report and "<td>set r</td><td>4</td>" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "rr=4"), "LoraConfig has no field 'rr' (nearest: 'r')"),
        (("--set", "rank=4"), "LoraConfig has no field 'rank'. Did you mean 'r'?"),
        (("--set", "alpha=4"), "LoraConfig has no field 'alpha'. Did you mean 'lora_alpha'?"),
        (("--set", "r=four"), "'r' takes a whole number, found 'four'"),
        (("--set", "r=0"), "r must be a positive whole number, found 0"),
        (("--set", "target_modules=q_prj"), "'q_prj' matches no module"),
        (("--method", "lorra"), "no PEFT method 'lorra' is installed"),
        (("--dtype", "fp8"), "--dtype must be one of auto, fp32, bf16, found 'fp8'"),
        (("--precision", "bf8"), "--precision must be one of auto, fp32, bf16, fp16, found 'bf8'"),
        (("--precision", "fp16", "--device", "cpu"), "PyTorch only supports on CUDA. Use --precision bf16 on a CPU"),
        (("--precision", "fp32", "--dtype", "bf16"), "Remove --dtype bf16"),
        (("--optim", "adamm"), "adamm"),
        (("--scheduler", "cosin"), "cosin is not a valid SchedulerType, please select one of"),
        (("--scheduler", "cosine_with_min_lr"), "needs arguments that the command line cannot set"),
        (
            ("--holdout", "1.5"),
            "--holdout must be a fraction between 0 and 1, such as 0.1, or a whole number of examples",
        ),
        (("--holdout", "14"), "--holdout 14 leaves no examples to train on: the data has 14. Hold out fewer"),
        (("--lr", "0"), "--lr and --epochs must be above 0"),
        (("--lr", "1e30", "--warmup", "0", "--steps", "9"), "the loss is nan at step"),
        (
            ("--task", "poetry"),
            ", grpo, found 'poetry'",
        ),
        (("--model", "./nowhere"), "the path './nowhere' does not exist"),
        (("--device", "tpu9"), "unknown device 'tpu9'"),
    ],
)
def test_wrong_settings(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    method = () if "--method" in arguments else ("--method", "lora")
    error = run("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--steps", 1, *method, *arguments, code=1)
    assert message in error.output
    assert "Traceback" not in error.output


def test_a_run_that_failed_before_it_made_anything_does_not_block_its_folder(tmp_path: Path) -> None:
    from peftcore_cli.settings import RUN_FILE, prepare_folder

    class Noted:
        def to_json(self) -> dict[str, int]:
            return {"steps": 1}

    for _ in range(2):
        prepare_folder(tmp_path / "run", Noted(), resume=False, overwrite=False)
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(peftcore.PeftcoreError, match="already contains a run"):
        prepare_folder(tmp_path / "run", Noted(), resume=False, overwrite=False)
    assert (tmp_path / "run" / RUN_FILE).exists()
