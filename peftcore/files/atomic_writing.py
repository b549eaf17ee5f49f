"""Writing of the adapters of one save, all or none, while other processes may save to the same folder.

1. lock the folders                                   one save at a time
2. finish a save that was killed after its step 4
3. write every file under a temporary name
4. rename the manifest into place                     from now on `load` finds the new adapters,
5. rename every file into place                       and from now on other readers do
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialized
from torch import Tensor

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.files.folder import (
    CONFIG_HASH,
    MANIFEST,
    Folder,
    Manifest,
    read_manifest,
    root_of,
    sha256,
    temporary_name,
)
from peftcore.files.safe_reading import CONFIG, TENSORS

try:
    import fcntl
except ImportError:  # Windows: unique names and hashes still prevent that a mixture is read
    fcntl = None  # type: ignore[assignment]

CARD = "README.md"  # written after a save
PATIENCE = 120  # seconds to wait for other processes that save to the same folder


@dataclass(frozen=True)
class Content:
    """One adapter as it is written.

    Args:
        fields: fields of its `adapter_config.json`.
        tensors: its tensors by their names on disk, contiguous and on the CPU.
        metadata: metadata of the tensors' file.
    """

    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def write_adapters(folder: Path, adapters: Mapping[str, Content]) -> None:
    """Write adapters, all or none, to subfolders of their names; the adapter "" to `folder` itself.

    Raises:
        CheckpointError: they cannot be written. The message says what is in the folder then.
    """
    with _errors_named(folder):
        inside = [folder / name for name in filter(None, adapters)]
        for each in inside:
            _refuse_link(each)
        with made(folder, *inside), locked(folder, adapters) as (root, prefix):
            if prefix and [*adapters] != [""]:
                raise CheckpointError(
                    f"'{folder}' is one of the adapters that were saved together to '{root}': it takes one adapter. "
                    "Save several to another folder"
                )
            _write(root, {prefix.rstrip("/"): adapters[""]} if prefix else adapters, keep_others=bool(prefix))


def write_file(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = temporary_name(file, secrets.token_hex(8))
    with _errors_named(file), made(file.parent):
        try:
            create(temporary, to_bytes(dict(tensors), {"format": "pt", **metadata}))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(file.parent)


@contextlib.contextmanager
def made(*folders: Path) -> Iterator[None]:
    """Make `folders` and their parents for the block; after an error, remove those that were made and are empty."""
    new = {each: None for folder in folders for each in (folder, *folder.parents) if not each.exists()}
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in sorted(new, key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):  # it is not empty
                each.rmdir()
        raise


def to_bytes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file whose metadata are sorted: the library writes them in an order of its own."""
    content = serialized(tensors, dict(metadata))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[8 + size :]])


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Turn errors of the file system into CheckpointErrors about `path`."""
    try:
        yield
    except PeftcoreError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"the adapter could not be saved to '{path}': {error.strerror or error}. Existing files are unchanged"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"the adapter could not be saved: {str(path)!a} cannot be a path ({error})") from error


def _refuse_link(folder: Path) -> None:
    """Raise a CheckpointError if one of several adapters would be written through a link to another place."""
    if os.path.islink(folder):
        raise CheckpointError(
            f"'{folder}' is a link to '{os.path.realpath(folder)}', and nothing is written outside the folder that was "
            "named. Delete the link, or save to another folder"
        )


def _write(root: Path, adapters: Mapping[str, Content], keep_others: bool) -> None:
    folders = [root, *(root / name for name in adapters if name)]
    before = _finished(root, folders)
    files = dict(before.files) if before and keep_others else {}
    token = secrets.token_hex(8)  # another process may write the same at the same time
    new: list[Path] = []
    manifest = None
    try:
        for name, content in adapters.items():
            config = json.dumps(content.fields, indent=2, sort_keys=True).encode() + b"\n"
            metadata = {"format": "pt", **content.metadata, CONFIG_HASH: sha256(config)}
            for file, data in ((CONFIG, config), (TENSORS, to_bytes(content.tensors, metadata))):
                path = root / name / file
                if path.is_dir():
                    raise IsADirectoryError(0, f"'{path}' is a folder")
                new.append(path)
                create(temporary_name(path, token), data)
                files[path.relative_to(root).as_posix()] = sha256(data)
        manifest = Manifest.of(files)
        for path in new:
            os.replace(temporary_name(path, token), manifest.temporary(path))
        new.append(root / MANIFEST)
        create(temporary_name(root / MANIFEST, token), (json.dumps(manifest.as_json(), indent=2) + "\n").encode())
        for each in folders:
            _sync(each)
        os.replace(temporary_name(root / MANIFEST, token), root / MANIFEST)
    except BaseException:
        for path in new:
            temporary_name(path, token).unlink(missing_ok=True)
        if manifest is not None and _manifest_or_none(root) != manifest:
            for path in new:
                manifest.temporary(path).unlink(missing_ok=True)
        raise
    try:
        put_in_place(root, manifest)
    except OSError as error:
        raise CheckpointError(
            f"the adapter is saved in '{root}', and peftcore loads it, but a file could not be renamed "
            f"({error.strerror or error}), so other programs do not find it. Save again"
        ) from error
    if _manifest_or_none(root) != manifest:
        raise CheckpointError(
            f"another process saved to '{root}' at the same time, on a file system without locks. "
            "Save again, or to another folder"
        )


def put_in_place(root: Path, manifest: Manifest) -> None:
    """Rename the files of a save whose manifest is in place to their final names."""
    files = [root / name for name in manifest.files]
    files = [file for file in files if file.parent == root or not os.path.islink(file.parent)]  # a stranger's manifest
    waiting = [file for file in files if os.path.lexists(manifest.temporary(file))]
    if waiting:
        _sync(root)  # the manifest comes first on the disk, too
    for file in waiting:
        os.replace(manifest.temporary(file), file)
        if file.parent != root:
            (file.parent / MANIFEST).unlink(missing_ok=True)  # of an earlier save of this one alone


def _finished(root: Path, folders: list[Path]) -> Manifest | None:
    """Finish the last save if it was killed, delete the files of unfinished ones, and return the manifest."""
    manifest = _manifest_or_none(root)
    if manifest is not None:
        put_in_place(root, manifest)
    names = "|".join(map(re.escape, (CONFIG, TENSORS, MANIFEST, CARD)))
    for folder in folders:
        _finish_older(folder)
        for file in folder.iterdir():
            if re.fullmatch(rf"\.({names})(\.[0-9a-f]{{16}})?\.tmp", file.name):
                file.unlink(missing_ok=True)
    return manifest


def _manifest_or_none(root: Path) -> Manifest | None:
    with contextlib.suppress(CheckpointError):  # an unreadable manifest is overwritten
        return read_manifest(root)
    return None


def _finish_older(folder: Path) -> None:
    """Put the config in place that a killed save has left from before there were manifests."""
    with contextlib.suppress(CheckpointError, FileNotFoundError):
        opened = Folder(folder, "", None)
        config = opened.config_of_killed_save()
        if config is not None and config != opened.content(CONFIG):
            os.replace(folder / f".{CONFIG}.tmp", folder / CONFIG)


@contextlib.contextmanager
def locked(folder: Path, inside: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Keep other processes from saving to `folder` and subfolders `inside`; yield (root of the save, prefix in it)."""
    deadline = time.monotonic() + PATIENCE
    while True:
        root, prefix = _root(folder)
        with contextlib.ExitStack() as locks:
            for each in dict.fromkeys([root, folder, *(folder / name for name in sorted(inside))]):
                locks.enter_context(_lock(each, deadline))
            if _root(folder) == (root, prefix):  # it may have become one of several meanwhile
                yield root, prefix
                return


def _root(folder: Path) -> tuple[Path, str]:
    try:
        return root_of(folder)[:2]
    except CheckpointError:  # a manifest that cannot be read
        return folder, ""


@contextlib.contextmanager
def _lock(folder: Path, deadline: float) -> Iterator[None]:
    while fcntl is not None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"the adapter was not saved: another process has been saving to '{folder}' for {PATIENCE} s. "
                    "The files there are that process's. Save to another folder"
                ) from None
            time.sleep(0.01)
            continue
        except OSError:  # a file system without locks
            os.close(descriptor)
            break
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may hold the descriptor, too
            os.close(descriptor)
        return
    yield


def create(file: Path, content: bytes) -> None:
    """Write a new file to the disk; fails if anything has its name, so that no link is followed."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with open(descriptor, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
