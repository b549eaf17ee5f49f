"""An adapter on Hugging Face's hub, `ORG/NAME`: the files that `load` reads, fetched into the hub's cache here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from peftcore.adapter_files import CONFIG, MANIFEST, TENSORS, Folder
from peftcore.checkpoint.reading import TOGETHER
from peftcore.checkpoint.single_file import file_names
from peftcore.errors import CheckpointError
from peftcore.registry import registry

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_OWN = [CONFIG, TENSORS, MANIFEST]


def folder_of(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder `path`; where there is none and it has the form of a hub's id, that of its files in the cache.

    Args:
        revision: a branch, tag or commit of the hub's.

    Raises:
        CheckpointError: the hub does not give it, or a folder here is asked for a revision.
    """
    folder = Path(path)
    if isinstance(path, str) and not os.path.lexists(folder) and _ID.fullmatch(path):
        return _fetched(path, revision)
    if revision is not None:
        what = f"'{path}' is a folder here" if os.path.isdir(folder) else f"'{path}' is no id ORG/NAME of the hub"
        raise CheckpointError(f"revision={revision!r} is one of an adapter on Hugging Face's hub, {what}. Leave it out")
    return folder


def _fetched(name: str, revision: str | None) -> Path:
    folder = _fetch(name, revision, _OWN)
    if not os.path.exists(folder / CONFIG) and not os.path.exists(folder / MANIFEST):
        files = file_names()
        folder = _fetch(name, revision, files) if files else folder
        if any(os.path.exists(folder / file) for file in files):
            return folder
        raise CheckpointError(f"'{name}' on Hugging Face's hub holds no adapter: {CONFIG} is missing")
    more = _more(folder)
    # Both at once, so that a commit between the two is none between an adapter's files.
    return _fetch(name, revision, [*_OWN, *more]) if more else folder


def _more(folder: Path) -> list[str]:
    """Files beside those of an adapter itself: of others that were saved together, or of another library's format."""
    try:
        opened = Folder.opened(folder)
        if opened.manifest is not None:
            return [name for name in opened.manifest.files if "/" in name]
        if TOGETHER in opened.metadata():
            return [f"*/{CONFIG}", f"*/{TENSORS}"]
        if not opened.holds(TENSORS) and opened.holds(CONFIG):
            return [form.tensors for method in registry.methods().values() for form in method.state.foreign]
    except CheckpointError:  # which reading it says in its own words
        pass
    return []


def _fetch(name: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"there is no folder '{name}'. To fetch an adapter of this name from Hugging Face's hub the library "
            "huggingface_hub is needed, which is not installed (it comes with transformers). Or give the folder into "
            "which you have downloaded it"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        why = " ".join(str(error).split())
        of = f" (revision {revision!r})" if revision is not None else ""
        raise CheckpointError(
            f"there is no folder '{name}', and Hugging Face's hub gives no adapter of this name{of}: "
            f"{type(error).__name__}: {why[:400]}. A folder of yours is found by its whole path; to an adapter that is "
            "private or gated the hub must know you; without a network only what is in its cache is there"
        ) from error
