"""Folders of labelled images, one subfolder per label, and images as models read them."""

from __future__ import annotations

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
_PARTS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
_OF_SYSTEMS = {"thumbs.db", "desktop.ini"}
_WIDE = ("I", "F")  # modes of pixels with more than 8 bits begin with these


def labelled(path: str) -> Iterator[tuple[str, str]]:
    """Yield (file, label) of each image in a folder with one subfolder per label, in alphabetical order.

    Raises:
        PeftcoreError: the folder is not like that.
    """
    root = Path(os.path.expanduser(path))
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "does not exist"
        raise PeftcoreError(f"'{path}' {what}. --task image needs a folder with one subfolder of images per label")
    entries = _listed(root)
    loose = next((each for each in entries if not each.is_dir()), None)
    if loose is not None:
        raise PeftcoreError(f"'{loose}' is in no subfolder, whose name is its label. Move it to one, or remove it")
    if not entries:
        raise PeftcoreError(f"folder '{path}' is empty. --task image needs one subfolder of images per label")
    if {each.name.lower() for each in entries} <= _PARTS:
        first = entries[0].name
        raise PeftcoreError(
            f"'{path}' has the subfolders {', '.join(each.name for each in entries)}, which are not labels. Name the "
            f"folders with the labels: --data {os.path.join(path, first)}, and another as --eval-data"
        )
    for folder in entries:
        files = _listed(folder)
        if not files:
            raise PeftcoreError(f"'{folder}' has no images. Remove it, or add images with this label")
        label = class_name(str(folder), "label", folder.name)
        for file in files:
            yield _checked(file), label


def unlabelled(path: str) -> list[str]:
    """Return the images of a folder and its subfolders, or an image itself.

    Raises:
        PeftcoreError: there are none, or a file is not an image.
    """
    root = Path(os.path.expanduser(path))
    if not os.path.exists(root):
        raise PeftcoreError(f"'{path}' does not exist. Pass an image, or a folder of images")
    if not os.path.isdir(root):
        return [_checked(root)]
    found = [file for each in _listed(root) for file in (unlabelled(str(each)) if each.is_dir() else [_checked(each)])]
    if not found:
        raise PeftcoreError(f"folder '{path}' has no images ({', '.join(SUFFIXES)})")
    return found


def is_labelled(path: str) -> bool:
    """Return whether `path` is a folder with an image in one of its subfolders."""
    root = Path(os.path.expanduser(path))
    if not os.path.isdir(root):
        return False
    folders = (each for each in _listed(root) if each.is_dir())
    return any(file.suffix.lower() in SUFFIXES for folder in folders for file in _listed(folder))


def opened(path: str) -> Image:
    """Return an image as RGB, upright, as transformers' pipelines read it; transparency is dropped.

    Raises:
        PeftcoreError: it is damaged, animated, too large, or has more than 8 bits per channel.
    """
    require("PIL", extra="images")
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: photos with a preview
                    count = getattr(image, "n_frames", 0)
                    raise PeftcoreError(f"'{path}' has {count} frames, and models read one. Save one as an image")
                if image.mode.startswith(_WIDE):
                    raise PeftcoreError(
                        f"'{path}' has pixels of more than 8 bits (mode {image.mode}), whose range is not known. "
                        "Convert it to 8 bits"
                    )
                upright = ImageOps.exif_transpose(image)
                if "transparency" in upright.info:
                    upright = upright.convert("RGBA")
                return upright.convert("RGB")
    except PeftcoreError:
        raise
    except Exception as error:  # readers raise anything on damaged bytes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PeftcoreError(f"'{path}' cannot be read as an image: {reason}. Replace it, or remove it") from error


def _listed(folder: Path) -> list[Path]:
    """Return the entries of a folder in alphabetical order, without hidden ones and those of file managers."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise PeftcoreError(f"'{folder}' cannot be read: {error.strerror or error}") from error
    return [each for each in found if not each.name.startswith(".") and each.name.lower() not in _OF_SYSTEMS]


def _checked(file: Path) -> str:
    """Return the path of a file whose name is that of an image."""
    if file.is_dir():
        raise PeftcoreError(f"'{file}' is a folder in a label's folder. Move its images to the label's folder")
    if file.suffix.lower() not in SUFFIXES:
        raise PeftcoreError(
            f"'{file}' must be an image ({', '.join(SUFFIXES)}), found '{file.suffix}'. Convert it, or remove it"
        )
    return str(file)
