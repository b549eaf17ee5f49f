"""What `train` says of its memory before it loads, and what it refuses; what `plan` says of a step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peftcore_cli.bases import models
from peftcore_cli.bases.adapter_folders import AdapterTask
from peftcore_cli.data import row_reading
from peftcore_cli.settings import RunOptions, Settings
from peftcore_cli.tasks import encoded_examples, media_chats
from peftcore_cli.tasks.registered import find
from peftcore_cli.training import forecast
from PIL import Image
from support import audio_models, image_models, tiny
from support.commands import WORDS, Run, write_jsonl
from support.step_memory import allocated_by, allocated_with, predicted
from support.whole_run import nightly_but
from transformers import WhisperConfig

import peftcore

METHOD = ("--method", "lora", "--set", "r=4")


def test_plan_says_what_a_step_takes(run: Run, llama: Path) -> None:
    here = run("plan", "-m", llama, *METHOD, "--batch-size", 2, "--max-length", 12).output
    assert "a training step of LlamaForCausalLM, lora, batch 2 x 12, without logits, fused operators" in here
    assert "peak" in here and "GB on this machine" in here
    card = run("plan", "-m", llama, *METHOD, "--max-length", 12, "--device", "rtx4090").output
    assert "fits into 22.1 GB on rtx4090" in card
    wrong = run("plan", "-m", llama, *METHOD, "--device", "rtx4091", code=1).output
    assert "unknown device 'rtx4091'" in wrong and "nearest: 'rtx4090'" in wrong


def test_plan_knows_the_options_of_a_light_step(run: Run, llama: Path) -> None:
    arguments = ("plan", "-m", llama, *METHOD, "--batch-size", 2, "--max-length", 12)
    assert "batch 2 x 12\n" in run(*arguments, "--without-logits", "off", "--fuse", "off").output
    assert "batch 2 x 12, fused operators\n" in run(*arguments, "--without-logits", "off").output
    assert "batch 2 x 12, fused operators\n" in run(*arguments, "--task", "tags", "--labels", "A,B").output
    card = run(*arguments, "--device", "h100").output
    assert "batch 2 x 12, without logits\n" in card


def test_what_will_not_fit_is_refused_before_it_loads(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "memory_here", lambda: 5e4)
    arguments = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", *METHOD, "--steps", 3, "--batch-size", 4)
    error = run(*arguments, code=1).output
    assert "needs about" in error and "loading" not in error
    assert "--batch-size 1 --grad-accum 4 or --gradient-checkpointing or --optim paged_adamw_8bit" in error
    assert "predicted peak" in run(*arguments, "--force").output
    found = json.loads((tmp_path / "run/result.json").read_text())
    low, high = found["predicted_peak"]
    assert 0.9 * low < found["peak_of_steps"] < 1.1 * high and high < 1.3 * low
    assert 0 < found["peak_of_steps"] < 1.01 * found["peak"]["memory"]  # of which the kernel keeps two counts
    page = (tmp_path / "run/report.html").read_text()
    assert "<h2>Memory over a step</h2>" in page and "<td>peak in a step</td>" in page


def test_what_is_not_known_is_said(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    arguments = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", *METHOD, "--steps", 1)
    output = run(*arguments, "--optim", "adafactor").output
    assert "memory is not predicted: the state size of --optim adafactor is unknown" in output


def test_a_wrong_field_is_one_error(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    arguments = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--method", "lora", "--steps", 1)
    assert run(*arguments, "--set", "r=0", code=1).output == "error: r must be a positive whole number, found 0\n"
    output = run(*arguments, "--set", "target_modules=nope", code=1).output
    assert output.count("'nope' matches no module") == 1 and "memory is not predicted" not in output


def test_an_error_of_the_forecast_alone_is_said_once_the_adapter_is_applied(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise peftcore.PeftcoreError("no values here")

    monkeypatch.setattr(peftcore, "estimate", refuse)
    output = run("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", *METHOD, "--steps", 1).output
    assert output.index("loading") < output.index("memory is not predicted: no values here") < output.index("trainable")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls what transformers has deprecated
def test_the_head_of_train_knows_how_it_runs(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", minversion="1.16")  # whose releases need Python 3.11
    said = []
    monkeypatch.setattr(forecast, "refuse_if_too_large", lambda found, settings: said.append(found.estimate))
    common = ("train", "-m", llama, *METHOD, "--steps", 1, "--batch-size", 2)
    run(*common, "-d", reviews, "-o", tmp_path / "plain")
    run(*common, "-d", reviews, "-o", tmp_path / "mixed", "--precision", "bf16")
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {n}:", "chosen": " yes and more of it", "rejected": " no"} for n in range(8)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    run(*common, "-d", pairs, "-o", tmp_path / "dpo", "--steps", 3)  # the last are measured
    plain, mixed, dpo = (found.step for found in said)
    assert (plain.mixed_precision, plain.loss, plain.ranks) == (None, None, 1)
    assert (mixed.mixed_precision, mixed.loss) == ("bf16", None) and mixed.length == plain.length
    assert dpo.loss == "dpo" and dpo.length > len("say 0:") / 4
    found = json.loads((tmp_path / "dpo/result.json").read_text())
    low, high = found["predicted_peak"]
    assert 0.8 * low < found["peak_of_steps"] < 1.2 * high


def test_plan_of_several_processes_and_mixed_precision(run: Run, llama: Path) -> None:
    pytest.importorskip("trl", minversion="1.16")  # whose releases need Python 3.11
    arguments = ("plan", "-m", llama, *METHOD, "--batch-size", 2, "--max-length", 12)
    several = run(*arguments, "--parallel", "fsdp2", "--ranks", 4, "--precision", "bf16").output
    assert "batch 2 x 12, mixed bf16, one of 4 ranks (FSDP2)" in several and "gathered weights" in several
    assert "batch 2 x 12, dpo" in run(*arguments, "--task", "dpo").output
    assert "2 processes need --parallel. Pass --parallel ddp" in run(*arguments, "--ranks", 2, code=1).output
    assert "one of ddp, fsdp2, found 'tp'" in run(*arguments, "--parallel", "tp", code=1).output
    assert (
        "--precision must be one of auto, fp32, bf16, fp16, found 'fp8'"
        in run(*arguments, "--precision", "fp8", code=1).output
    )


def test_processes_that_share_memory_need_it_each() -> None:
    estimate = peftcore.estimate(tiny.llama(), "lora", batch_size=1, length=8)
    alone = forecast.Forecast(estimate, libraries=500, room=1e9)
    assert replace(alone, together=3).required == 3 * alone.required == 3 * estimate.needed


def test_what_a_task_makes_of_a_step() -> None:
    losses = {task: forecast.step_options(task, "auto", None, 1)["loss"] for task in ("kto", "orpo", "asr")}
    assert losses == {"kto": "kto", "orpo": "dpo", "asr": None}
    config = WhisperConfig(max_target_positions=10)
    assert [forecast.tokens_of_step(50, task, config) for task in ("asr", "causal-lm")] == [
        10,
        50,
    ]
    for task, fuse, wanted in (
        ("pairs", "auto", True),
        ("pairs", "on", True),
        ("asr", "auto", True),
    ):
        settings = Settings(model="m", data="d", task=task, method="lora", fuse=fuse)
        assert forecast.is_fused(settings) == wanted


def chats_with(folder: Path, part: dict[str, str], count: int = 5) -> Path:
    """Conversations with an image or a recording, the first the longest."""
    Image.new("RGB", (40, 30), (60, 200, 20)).save(folder / "1.png")
    audio_models.save_tone(folder / "1.wav", 1.0, 200.0)
    words = {"type": "text", "text": "is it good " * 8}
    answers = ["very good fun " * (count - n) for n in range(count)]
    return write_jsonl(
        folder / "chats.jsonl",
        [
            {"messages": [{"role": "user", "content": [part, words]}, {"role": "assistant", "content": answer}]}
            for answer in answers
        ],
    )


FOLLOWED = list(image_models.KINDS)


def step_of(model: Path, file: Path, task: str) -> peftcore.Step:
    settings = Settings.from_options(RunOptions(), model=str(model), data=str(file), task=task, method="lora")
    return peftcore.Step(
        **{**forecast.step_options(task, "auto", None, 1), **forecast.step_data(settings), "batch_size": 3}
    )


@pytest.mark.parametrize("kind", nightly_but([*FOLLOWED, "audio"], ("smolvlm", "qwen", "audio")))
def test_a_step_on_images_and_audio(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest example's shapes, compared with the allocator's peak."""
    task = "audio-text" if kind == "audio" else "image-text"
    made = (audio_models.qwen if kind == "audio" else image_models.KINDS[kind])(tmp_path / kind)
    processor = media_chats.check_processor(made, kind, hears=kind == "audio")
    monkeypatch.setattr(models, "chat_processor", lambda *_, **_options: processor)
    part = {"type": "audio", "path": "1.wav"} if kind == "audio" else {"type": "image", "path": "1.png"}
    file, folder = chats_with(tmp_path, part), str(tmp_path / kind)
    step = step_of(tmp_path / kind, file, task)
    found = peftcore.estimate(models.empty_model(folder, task), "lora", step=step)
    model = models.load_model(folder, task, device="cpu").train()
    peftcore.apply(model, "lora")
    examples = find(task).encode(row_reading.read_rows(str(file), task), processor, 512).examples
    assert step.length == len(examples[0]["input_ids"])
    batch = encoded_examples.in_dtype(media_chats.collate(examples[:1] * 3, processor), model)
    assert predicted(found) == pytest.approx(allocated_with(model, lambda: model(**batch).loss), rel=5e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls what transformers has deprecated
def test_a_step_on_answers_to_images(tmp_path: Path) -> None:
    """DPO's passes with the images of the longer conversation, compared with TRL's trainer."""
    pytest.importorskip("trl", minversion="1.16")  # whose releases need Python 3.11
    image_models.smolvlm(tmp_path / "smolvlm")
    Image.new("RGB", (40, 30), (60, 200, 20)).save(tmp_path / "1.png")
    row = {"images": ["1.png"], "prompt": "is it good", "chosen": "very good", "rejected": "is it bad and dull"}
    file, folder, task = write_jsonl(tmp_path / "pairs.jsonl", [row] * 9), str(tmp_path / "smolvlm"), "image-dpo"
    step = step_of(tmp_path / "smolvlm", file, task)
    assert step.loss == "dpo" and step.example is not None and step.example["pixel_values"].shape[:2] == (1, 5)
    found = peftcore.estimate(models.empty_model(folder, task), "lora", step=step)
    model = peftcore.apply(models.load_model(folder, task, device="cpu"), "lora")
    processor = find(task).load_processor(folder)
    rows = find("image-dpo").encode(row_reading.read_rows(str(file), task), processor, 512).examples
    most = allocated_by(lambda watch: image_trainer(model, rows, processor, tmp_path, watch))
    assert predicted(found) == pytest.approx(most, rel=0.02)


def image_trainer(model: Any, rows: Any, processor: Any, folder: Path, watch: Any) -> Any:
    task = find("image-dpo")
    config = task.trl_classes()[1]
    settings = {"max_steps": 3, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 3, "remove_unused_columns": False, "dataloader_pin_memory": False}
    settings |= {"max_length": None, "bf16": False, "gradient_checkpointing": False}
    arguments = {
        "model": model,
        "args": config(str(folder / "run"), **settings),
        "train_dataset": rows,
        "eval_dataset": rows,
        "measure": None,
        "lengths": [len(row["chosen"]["input_ids"]) for row in rows],
        "callbacks": [watch],
    }
    return task.trainer(arguments, Settings("", "", "image-dpo", "lora"), processor, AdapterTask("image-dpo", 512))


def test_plan_suggest_and_fit_of_examples(run: Run, llama: Path, bert: Path, tmp_path: Path) -> None:
    image_models.smolvlm(tmp_path / "smolvlm")
    chats = chats_with(tmp_path, {"type": "image", "path": "1.png"})
    seen = ("-m", tmp_path / "smolvlm", "--method", "lora", "-d", chats)
    planned = run("plan", *seen, "--batch-size", 2).output
    assert "a training step of Idefics3ForConditionalGeneration, lora, batch 2 x 77, fused operators" in planned
    without = run("plan", *seen[:4], "--task", "image-text").output
    assert (
        "not predicted: the memory of --task image-text depends on the examples. Pass examples: --data FILE" in without
    )
    assert "twice the batch" in run("suggest", *seen, "--memory", "8GB").output
    texts = write_jsonl(
        tmp_path / "texts.jsonl",
        [{"anchor": f"the film is {word}", "positive": f"{word} story"} for word in WORDS[:20]],
    )
    pairs = ("-m", bert, "--method", "lora", "-d", texts, "--max-length", 16)
    assert "a training step of BertModel, lora, batch 8 x 16, pairs" in run("plan", *pairs).output
    assert "--batch-size 1 " not in run("suggest", *pairs, "--memory", "8GB").output
    trained = run("train", *pairs, "-o", tmp_path / "run", "--fit", "--steps", 1, "--batch-size", 6).output
    assert "--fit chooses --batch-size 6 --grad-accum 1" in trained and "predicted peak" in trained
