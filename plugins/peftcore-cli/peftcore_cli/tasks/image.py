"""Image classification (`--task image`).

Images are decoded batch by batch, so the data set does not have to fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import models
from peftcore_cli.data import image_files
from peftcore_cli.data.data_files import Record
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.row import Row
from peftcore_cli.settings import RunOptions
from peftcore_cli.tasks.classification import Classification
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.row_labels import targets

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask


class Images(Classification):
    """Image classification on a folder with one subfolder of images per label."""

    name = "image"
    shown_keys = None
    model_class = "AutoModelForImageClassification"
    needed_model = "a model that classifies images, such as a ViT, found {}. Pass another model"
    peft_task_type = None
    replaces_head = True  # image checkpoints usually have a head for another data set
    reads_tokens = has_positions = generates = takes_pairs = counts_tokens = False
    no_chat = "classifies images. Use peftcore predict --data IMAGES"

    def reads_files(self, paths: Sequence[str]) -> bool:
        return all(image_files.is_labelled(path) for path in paths)

    def recognises(self, lines: FirstLines) -> bool:
        return False

    def read(
        self,
        paths: Sequence[str],
        columns: Mapping[str, str] | None,
        records: Sequence[Iterable[Record]] | None = None,
    ) -> list[Iterator[Row]]:
        if columns:
            raise PeftcoreError(
                "--columns does not work with folders of images, which have no columns. Remove --columns"
            )
        folders = [image_files.labelled_images(path) for path in paths]
        return [(Row(file, "", label=label, image=file) for file, label in folder) for folder in folders]

    def read_questions(self, paths: Sequence[str], columns: Mapping[str, str] | None, about: AdapterTask) -> list[Row]:
        files = [file for path in paths for file in image_files.image_paths(path)]
        return [Row(file, "", label=about.labels[0], image=file) for file in files]

    def load_processor(self, model: str, adapter: Path | None = None) -> Any:
        return models.image_processor(model, self.name)

    def check_options(self, run_options: RunOptions, data: Sequence[str], *, continues: bool) -> None:
        if run_options.chat_template is not None or run_options.columns is not None:
            raise PeftcoreError("--chat-template and --columns do not work with --task image. Remove these options")

    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as `image`, the path of a file, and `labels`, after decoding each image once to check it.

        Raises:
            PeftcoreError: an image cannot be read, or its label is unknown.
        """
        label_indices = targets(list(rows), list(labels))
        for row in rows:
            image_files.open_image(str(row.image))
        return Encoded(
            [{"image": row.image, "labels": label} for row, label in zip(rows, label_indices, strict=True)], 0
        )

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        """Return a batch of the processor's tensors, such as `pixel_values`, and `labels` [batch]."""
        images = [image_files.open_image(example["image"]) for example in examples]
        tensors = processor(images=images, return_tensors="pt")
        return {**tensors, "labels": torch.tensor([example["labels"] for example in examples])}

    def fields_of(self, row: Row) -> dict[str, Any]:
        return {"image": row.image}
