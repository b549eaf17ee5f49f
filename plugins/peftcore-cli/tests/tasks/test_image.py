"""`--task image`: folders of labelled images, how an image is read, training as Trainer's own, and new images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.data import image_files, row_reading
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import row_labels
from peftcore_cli.tasks.registered import find
from peftcore_cli.training import trainer_arguments
from peftcore_cli.training.sampler import LengthGroupedSampler
from PIL import Image
from support.commands import Run
from support.measured import measured

import peftcore
from peftcore import PeftcoreError

METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu")
COLORS = {"blue": (20, 20, 200), "red": (200, 20, 20)}


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViT of random weights, with a head of five labels, and its image processor."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTConfig(image_size=16, patch_size=8, num_labels=5, **sizes)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images for each of two labels, in different sizes and modes."""
    for label, color in COLORS.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(6):
            image = Image.new("RGB", (20 + i, 30), tuple(min(255, value + 9 * i) for value in color))
            image.convert("RGBA" if i == 0 else "RGB").save(tmp_path / "photos" / label / f"{i}.png")
    return tmp_path / "photos"


def test_a_subfolder_is_a_label(photos: Path) -> None:
    (photos / ".hidden").write_text("")
    (photos / "red" / "Thumbs.db").write_text("")
    rows = row_reading.read_rows(photos, "image")
    assert row_reading.guess_task([str(photos)]) == "image" and row_labels.labels_of(rows) == ["blue", "red"]
    assert [(row.image, row.label) for row in rows[5:7]] == [
        (str(photos / "blue" / "5.png"), "blue"),
        (str(photos / "red" / "0.png"), "red"),
    ]


def broken(photos: Path, how: str) -> None:
    if how == "loose":
        (photos / "a.png").write_bytes(b"")
    elif how == "nested":
        (photos / "red" / "more").mkdir()
    elif how == "empty":
        (photos / "green").mkdir()
    elif how == "parts":
        (photos / "red").rename(photos / "train")
        (photos / "blue").rename(photos / "test")
    elif how == "other":
        (photos / "red" / "a.heic").write_bytes(b"")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("loose", r"a.png' is not in a subfolder named after its label. Move the image to one"),
        ("nested", r"red/more' is a subfolder in the folder of a label. Move its images"),
        ("empty", r"green' has no images. Remove the folder"),
        (
            "parts",
            r"are splits instead of labels: test, train. Pass --data \S+photos/test",
        ),
        ("other", r"a.heic' must be an image \(.jpg, .* found '.heic'. Convert it"),
    ],
)
def test_other_folders(photos: Path, how: str, message: str) -> None:
    broken(photos, how)
    with pytest.raises(PeftcoreError, match=message):
        row_reading.read_rows(photos, "image")


def test_names_of_folders_are_labels_as_those_of_tables(photos: Path) -> None:
    (photos / "red").rename(photos / " red ")
    assert {row.label for row in row_reading.read_rows(photos, "image")} == {"blue", "red"}
    (photos / "blue").rename(photos / "nan")
    with pytest.raises(PeftcoreError, match="photos/nan: 'label' is nan, which usually stands"):
        row_reading.read_rows(photos, "image")


def test_what_is_no_folder(photos: Path) -> None:
    with pytest.raises(PeftcoreError, match=r"is a file\. --task image needs a folder with one subfolder"):
        row_reading.read_rows(photos / "red" / "0.png", "image")
    with pytest.raises(PeftcoreError, match="does not exist"):
        row_reading.read_rows(photos / "none", "image")
    with pytest.raises(
        PeftcoreError, match="every training example has the label 'red', but a classifier needs at least two"
    ):
        row_labels.labels_of([row for row in row_reading.read_rows(photos, "image") if row.label == "red"])
    assert not image_files.is_labelled(str(photos / "red"))


def test_modes_and_orientation_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    torch.manual_seed(0)
    pixels = torch.randint(0, 255, (8, 6, 4), dtype=torch.uint8).numpy()
    image = Image.fromarray(pixels, "RGBA")
    turned = Image.Exif()
    turned[0x0112] = 6
    suffixes = {"RGBA": "png", "LA": "png", "L": "jpg", "P": "gif", "1": "png", "CMYK": "tif"}
    for mode, suffix in suffixes.items():
        file = tmp_path / f"{mode}.{suffix}"
        (image if mode in ("RGBA", "LA") else image.convert("RGB")).convert(mode).save(file)
        with Image.open(file) as theirs:
            wanted = load_image(theirs)
        found = image_files.open_image(str(file))
        assert found.mode == "RGB" and found.tobytes() == wanted.tobytes()
    image.convert("RGB").save(tmp_path / "turned.jpg", exif=turned)
    found = image_files.open_image(str(tmp_path / "turned.jpg"))
    assert found.size == (8, 6) and found.tobytes() == load_image(str(tmp_path / "turned.jpg")).tobytes()


def test_images_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole.png"
    Image.effect_noise((40, 40), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(
            PeftcoreError, match=rf"cannot read the image '.*{name}': .*. Replace the file, or remove its row"
        ):
            image_files.open_image(str(tmp_path / name))
    Image.new("I;16", (4, 4), 40_000).save(tmp_path / "deep.png")
    with pytest.raises(PeftcoreError, match=r"has more than 8 bits per channel \(mode I(;16)?\)"):
        image_files.open_image(str(tmp_path / "deep.png"))
    frames = [Image.new("L", (4, 4), value) for value in (0, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(PeftcoreError, match="has 2 frames, but models read single images"):
        image_files.open_image(str(tmp_path / "moving.gif"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(PeftcoreError, match="exceeds limit"):
        image_files.open_image(str(whole))


def test_measured_by_hand(vit: Path, photos: Path) -> None:
    processor = find("image").load_processor(str(vit))
    model = models.load_model(str(vit), "image", device="cpu", labels=("blue", "red"))
    assert model.config.id2label == {0: "blue", 1: "red"}
    rows = row_reading.read_rows(photos, "image")
    examples = find("image").encode(rows, processor, 2, ("blue", "red")).examples
    pixels = processor([Image.open(row.image).convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixels).logits
    wanted = torch.tensor([0] * 6 + [1] * 6)
    found = measured("image", model, examples, processor, 5)
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, wanted)), rel=1e-5)
    assert found.figures["accuracy"] == pytest.approx(float((logits.argmax(-1) == wanted).double().mean()))


def test_end_to_end(run: Run, vit: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ("-m", vit, "-d", photos, *METHOD, "--lr", "0.02", "--batch-size", 4, "--holdout", 4)
    text = run("train", *arguments, "-o", output, "--steps", 9, "--metric", "accuracy", "--load-best").output
    assert "the head of" in text and "is for other labels, so it was replaced by a new head for 2" in text
    found = json.loads((output / "result.json").read_text())
    assert found["after"]["accuracy"] == 1.0 and found["labels"] == ["blue", "red"] and found["eval_rows"] == 4
    assert "examples/s" in text and "tokens/s" not in text and f"predict {output}" in text
    assert json.loads((output / "adapter" / "peftcore_task.json").read_text())["labels"] == ["blue", "red"]
    assert "1.0000" in run("eval", output, "-d", photos).output

    new = tmp_path / "new"
    new.mkdir()
    for label, color in COLORS.items():
        Image.new("RGB", (9, 9), color).save(new / f"{label}.png")
    answers = [json.loads(line) for line in run("predict", output, "-d", new).stdout.splitlines()]
    assert [(Path(each["image"]).stem, each["label"]) for each in answers] == [("blue", "blue"), ("red", "red")]
    assert all(0.5 < each["probability"] <= 1 for each in answers)
    assert "Use peftcore predict" in run("generate", output, "-p", "x", code=1).output
    run("merge", output, "-o", tmp_path / "merged")
    from transformers import AutoModelForImageClassification

    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    processor = find("image").load_processor(str(tmp_path / "merged"))
    with torch.no_grad():
        chances = merged(**processor(Image.open(new / "red.png"), return_tensors="pt")).logits.softmax(-1)
    assert float(chances[0, 1]) == pytest.approx(answers[1]["probability"], abs=1e-4)


def test_misuse(run: Run, vit: Path, llama: Path, photos: Path, tmp_path: Path) -> None:
    def refused(*more: Any, model: Path = vit) -> str:
        return run("train", "-m", model, "-d", photos, *METHOD, "-o", tmp_path / "no", *more, code=1).output

    assert "--columns does not work with folders of images" in refused("--columns", "text=a")
    assert "--pack only works with causal-lm (the task is image)" in refused("--pack")
    assert "needs a model that classifies images" in refused(model=llama)
    other = tmp_path / "other"
    (other / "green").mkdir(parents=True)
    (other / "green" / "a.png").write_bytes((photos / "red" / "0.png").read_bytes())
    message = refused("--eval-data", other)
    assert "unknown label 'green'" in message and "train with examples of it" in message
    (photos / "red" / "0.png").write_bytes(b"no image")
    assert "cannot read the image '" in refused()


@pytest.mark.nightly
def test_losses_are_those_of_trainer(run: Run, vit: Path, photos: Path, tmp_path: Path) -> None:
    """transformers' Trainer on the pixels of the same images, in the order that our sampler draws them."""
    from transformers import AutoModelForImageClassification, Trainer, set_seed

    common = ("-m", vit, "-d", photos, "--eval-data", photos, *METHOD, "--lr", "0.02", "--batch-size", 6)
    run("train", *common, "-o", tmp_path / "run", "--epochs", 2)
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    ours = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    rows = row_reading.read_rows(photos, "image")
    processor = find("image").load_processor(str(vit))
    order = LengthGroupedSampler([1] * 12, 6, 0)
    drawn = [rows[i] for i in order]
    order.set_epoch(1)
    drawn += [rows[i] for i in order]
    examples = [
        {
            "pixel_values": processor(Image.open(row.image).convert("RGB"), return_tensors="pt")["pixel_values"][0],
            "labels": int(row.label == "red"),
        }
        for row in drawn
    ]
    set_seed(0)
    model = AutoModelForImageClassification.from_pretrained(vit, num_labels=2, ignore_mismatched_sizes=True)
    peftcore.apply(model, "lora", r=4)
    settings = Settings(model="", data="", task="image", method="lora", lr=0.02, batch_size=6, device="cpu")
    arguments = trainer_arguments.of_run(settings, tmp_path / "theirs", 24)
    arguments.num_train_epochs, arguments.train_sampling_strategy = 1, "sequential"
    arguments.warmup_steps, arguments.eval_strategy, arguments.save_strategy = 1, "no", "no"
    trainer = Trainer(model=model, args=arguments, train_dataset=examples)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-4) and ours[-1] < ours[0]
