"""Download of an adapter `ORG/NAME` from the Hugging Face Hub into its cache."""

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
_ADAPTER_FILES = [CONFIG, TENSORS]
_SUBFOLDER_FILES = [f"*/{CONFIG}", f"*/{TENSORS}"]  # files of adapters that were saved together


def folder_of(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the local folder `path`; if it does not exist and is a hub id, download the adapter and return its folder.

    Args:
        path: folder or hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: the download fails, or a revision is given for a local folder.
    """
    folder = Path(path)
    if isinstance(path, str) and not os.path.lexists(folder) and _ID.fullmatch(path):
        return _download(path, revision)
    if revision is not None:
        problem = "is a local folder" if os.path.isdir(folder) else "is not a hub id (ORG/NAME)"
        raise CheckpointError(
            f"revision={revision!r} only works with adapters on the Hugging Face Hub, but '{path}' {problem}. Remove "
            "the argument"
        )
    return folder


def _download(name: str, revision: str | None) -> Path:
    folder = _snapshot(name, revision, _ADAPTER_FILES)
    if not os.path.exists(folder / CONFIG):
        files = file_names()
        folder = _snapshot(name, revision, [*files, *_SUBFOLDER_FILES])
        if any(os.path.exists(folder / file) for file in files) or any(folder.glob(f"*/{CONFIG}")):
            return folder
        raise CheckpointError(f"'{name}' on the Hugging Face Hub does not contain an adapter: {CONFIG} is missing")
    further_files = _further_files(folder)
    # Request all files in one call, so that they come from the same commit.
    return _snapshot(name, revision, [*_ADAPTER_FILES, *further_files]) if further_files else folder


def _further_files(folder: Path) -> list[str]:
    """Return additional files to download: files of adapters saved together, or of another library's format."""
    try:
        folder_files = Folder.open(folder)
        if TOGETHER in folder_files.metadata():
            return _SUBFOLDER_FILES
        if not folder_files.has(TENSORS) and folder_files.has(CONFIG):
            formats = chain.from_iterable(method.state.foreign for method in registry.methods().values())
            return [form.tensors for form in formats]
    except CheckpointError:  # `load` raises a better error when it reads the folder
        pass
    return []


def _snapshot(name: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"the folder '{name}' does not exist, and downloading it from the Hugging Face Hub needs the library "
            "huggingface_hub, which is not installed. Install it (pip install huggingface_hub), or download the "
            "adapter and pass its folder"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        reason = " ".join(str(error).split())
        revision_text = f" (revision {revision!r})" if revision is not None else ""
        raise CheckpointError(
            f"the folder '{name}' does not exist, and no adapter with this name{revision_text} could be downloaded "
            f"from the Hugging Face Hub: {type(error).__name__}: {reason[:400]}. For a local folder, check the path. "
            "For a private or gated adapter, log in. Without a network connection, only cached adapters can be "
            "loaded"
        ) from error
