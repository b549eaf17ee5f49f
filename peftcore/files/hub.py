"""Download of an adapter `ORG/NAME` from Hugging Face's hub into its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from peftcore.errors import CheckpointError
from peftcore.files.folder import Folder
from peftcore.files.metadata import TOGETHER
from peftcore.files.single_file import file_names
from peftcore.plugin.registry import registry
from peftcore.plugin.safe_reading import CONFIG, TENSORS

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_OWN = [CONFIG, TENSORS]
_INSIDE = [f"*/{CONFIG}", f"*/{TENSORS}"]  # of adapters saved together


def folder_of(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder `path`, or the cache folder of the hub's adapter with this id if there is no such folder.

    Args:
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: the hub does not provide it, or a revision is given for a local folder.
    """
    folder = Path(path)
    if isinstance(path, str) and not os.path.lexists(folder) and _ID.fullmatch(path):
        return _fetched(path, revision)
    if revision is not None:
        problem = "is a local folder" if os.path.isdir(folder) else "is not an id ORG/NAME of the hub"
        raise CheckpointError(
            f"revision={revision!r} is for adapters on Hugging Face's hub, but '{path}' {problem}. Leave it out"
        )
    return folder


def _fetched(name: str, revision: str | None) -> Path:
    folder = _fetch(name, revision, _OWN)
    if not os.path.exists(folder / CONFIG):
        files = file_names()
        folder = _fetch(name, revision, [*files, *_INSIDE])
        if any(os.path.exists(folder / file) for file in files) or any(folder.glob(f"*/{CONFIG}")):
            return folder
        raise CheckpointError(f"'{name}' on Hugging Face's hub does not contain an adapter: {CONFIG} is missing")
    further_files = _more(folder)
    # Both in one call, so that no commit can come between an adapter's files.
    return _fetch(name, revision, [*_OWN, *further_files]) if further_files else folder


def _more(folder: Path) -> list[str]:
    """Return further files: of adapters saved together, or of another library's format."""
    try:
        opened = Folder.opened(folder)
        if TOGETHER in opened.metadata():
            return _INSIDE
        if not opened.has(TENSORS) and opened.has(CONFIG):
            formats = chain.from_iterable(method.state.foreign for method in registry.methods().values())
            return [form.tensors for form in formats]
    except CheckpointError:  # reading it raises the proper error
        pass
    return []


def _fetch(name: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"the folder '{name}' does not exist, and downloading an adapter of this name from Hugging Face's hub "
            "needs the library huggingface_hub, which is not installed (it comes with transformers). Install it, or "
            "pass the folder into which you have downloaded the adapter"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        reason = " ".join(str(error).split())
        of = f" (revision {revision!r})" if revision is not None else ""
        raise CheckpointError(
            f"the folder '{name}' does not exist, and Hugging Face's hub does not provide an adapter of this name{of}: "
            f"{type(error).__name__}: {reason[:400]}. Check the path if you mean a local folder; log in for a private "
            "or gated adapter; without a network, only adapters in the cache can be loaded"
        ) from error
