"""Images and their labels (`--task image`): each image as the model's image processor prepares it.

Images are decoded batch by batch, so that a data set need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftcore.cli.data import image_files
from peftcore.cli.data.row import Row
from peftcore.cli.tasks.row_labels import targets


def encode(rows: Sequence[Row], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows as `image`, the path of a file, and `labels`, after decoding each image once.

    Raises:
        PeftcoreError: an image cannot be read, or its label is unknown.
    """
    wanted = targets(list(rows), list(labels))
    for row in rows:
        image_files.opened(str(row.image))
    return [{"image": row.image, "labels": label} for row, label in zip(rows, wanted, strict=True)]


def collate(examples: Sequence[dict[str, Any]], processor: Any) -> dict[str, Any]:
    """Return a batch: what the processor makes of the images, such as `pixel_values`, and `labels` [batch]."""
    images = [image_files.opened(example["image"]) for example in examples]
    tensors = processor(images=images, return_tensors="pt")
    return {**tensors, "labels": torch.tensor([example["labels"] for example in examples])}
