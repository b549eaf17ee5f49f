"""Read folders of images with one subfolder per label, and decode images."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from peftcore.errors import PeftcoreError
from peftcore_cli.console import require
from peftcore_cli.data.labels import class_name

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
_WIDE = ("I", "F")  # prefixes of the modes with more than 8 bits per channel


def labelled_images(path: str) -> Iterator[tuple[str, str]]:
    """Yield (file, label) of each image in a folder with one subfolder per label, in alphabetical order.

    Raises:
        PeftcoreError: the folder does not have one subfolder of images per label.
    """
    root = Path(os.path.expanduser(path))
    if not os.path.isdir(root):
        problem = "is a file" if os.path.exists(root) else "does not exist"
        raise PeftcoreError(f"'{path}' {problem}. --task image needs a folder with one subfolder of images per label")
    entries = _entries_of(root)
    stray = next((entry for entry in entries if not entry.is_dir()), None)
    if stray is not None:
        raise PeftcoreError(
            f"the image '{stray}' is not in a subfolder named after its label. Move the image to one, or remove it"
        )
    if not entries:
        raise PeftcoreError(f"the folder '{path}' is empty. --task image needs one subfolder of images per label")
    if {entry.name.lower() for entry in entries} <= _SPLITS:
        first_name = entries[0].name
        raise PeftcoreError(
            f"the subfolders of '{path}' are splits instead of labels: "
            f"{', '.join(entry.name for entry in entries)}. Pass --data {os.path.join(path, first_name)}, and another "
            "split as --eval-data"
        )
    for folder in entries:
        files = _entries_of(folder)
        if not files:
            raise PeftcoreError(
                f"the folder '{folder}' has no images. Remove the folder, or add images with this label"
            )
        label = class_name(str(folder), "label", folder.name)
        for file in files:
            yield _image_path(file), label


def image_paths(path: str) -> list[str]:
    """Return the paths of the images in a folder and its subfolders, or of a single image.

    Raises:
        PeftcoreError: there are no images, or a file is not an image.
    """
    root = Path(os.path.expanduser(path))
    if not os.path.exists(root):
        raise PeftcoreError(f"'{path}' does not exist. Pass an image, or a folder of images")
    if not os.path.isdir(root):
        return [_image_path(root)]
    files: list[str] = []
    for entry in _entries_of(root):
        files += image_paths(str(entry)) if entry.is_dir() else [_image_path(entry)]
    if not files:
        raise PeftcoreError(f"the folder '{path}' has no images. Pass a folder with images ({', '.join(SUFFIXES)})")
    return files


def is_labelled(path: str) -> bool:
    """Return whether `path` is a folder with an image in one of its subfolders."""
    root = Path(os.path.expanduser(path))
    if not os.path.isdir(root):
        return False
    folders = filter(Path.is_dir, _entries_of(root))
    files = itertools.chain.from_iterable(map(_entries_of, folders))
    return any(file.suffix.lower() in SUFFIXES for file in files)


def open_image(path: str) -> Image:
    """Decode an image to upright RGB without transparency, as transformers' pipelines do.

    Raises:
        PeftcoreError: the image is damaged, animated, too large, or has more than 8 bits per channel.
    """
    require("PIL", extra="images")
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: photos with a preview
                    count = getattr(image, "n_frames", 0)
                    raise PeftcoreError(
                        f"the image '{path}' has {count} frames, but models read single images. Save one frame as an "
                        "image"
                    )
                if image.mode.startswith(_WIDE):
                    raise PeftcoreError(
                        f"the image '{path}' has more than 8 bits per channel (mode {image.mode}), and the range of "
                        "its values is unknown. Convert it to 8 bits"
                    )
                upright = ImageOps.exif_transpose(image)
                if "transparency" in upright.info:
                    upright = upright.convert("RGBA")
                return upright.convert("RGB")
    except PeftcoreError:
        raise
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PeftcoreError(f"cannot read the image '{path}': {reason}. Replace the file, or remove its row") from error


def _entries_of(folder: Path) -> list[Path]:
    """Return the entries of a folder in alphabetical order, without hidden files and files of file managers."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise PeftcoreError(
            f"cannot read the folder '{folder}': {error.strerror or error}. Check its permissions"
        ) from error
    return [entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_FILES]


def _image_path(file: Path) -> str:
    """Return the path of a file after checking that it has the suffix of an image."""
    if file.is_dir():
        raise PeftcoreError(f"'{file}' is a subfolder in the folder of a label. Move its images to the label's folder")
    if file.suffix.lower() not in SUFFIXES:
        raise PeftcoreError(
            f"'{file}' must be an image ({', '.join(SUFFIXES)}), found '{file.suffix}'. Convert it, or remove it"
        )
    return str(file)
