"""Read a folder as one save left it, also beside a process that saves there at the same time.

The manifest gives every file's hash. A file that has been renamed into place since, or not yet, is told by it: what is
read is one save, or is read again. Of a folder without a manifest it is asked whether one has appeared meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from peftcore.errors import CheckpointError
from peftcore.files.safe_reading import (
    CONFIG,
    JSON_BYTES,
    TENSORS,
    parse_json,
    parse_metadata,
    parse_tensors,
    read_bytes,
    read_header,
)

MANIFEST = "peftcore_manifest.json"
CONFIG_HASH = "peftcore_config_sha256"  # in the metadata of tensors that had no manifest yet
_VERSION = 1
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PATIENCE = 60  # seconds, for which another process may save again and again before a reader gives up

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """The files of one save, by path relative to the folder, with the sha256 of each.

    Until a save is done, a file may lie under its temporary name, which `token` makes the save's own.
    """

    token: str
    files: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return {"version": _VERSION, "save": self.token, "sha256": self.files}

    def temporary(self, file: Path) -> Path:
        """The name of `file` until it takes the place of the old one."""
        return file.with_name(f".{file.name}.{self.token}.tmp")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder` itself, or None.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = folder / MANIFEST
    try:
        manifest = parse_json(read_bytes(file, JSON_BYTES), file)
    except FileNotFoundError:
        return None
    if isinstance(manifest, dict) and isinstance(manifest.get("version"), int) and manifest["version"] > _VERSION:
        raise CheckpointError(
            f"'{file}' was written by a newer peftcore (version {manifest['version']}). Upgrade peftcore"
        )
    token, files = (manifest.get("save"), manifest.get("sha256")) if isinstance(manifest, dict) else (None, None)
    if (
        not (isinstance(token, str) and re.fullmatch("[0-9a-f]{16}", token))
        or not isinstance(files, dict)
        or not all(_names_a_file(name) for name in files)
        or not all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in files.values())
    ):
        raise CheckpointError(f"'{file}' is no manifest. Copy the folder again, or save the adapter again")
    return Manifest(token, files)


def _names_a_file(name: str) -> bool:
    *inside, last = name.split("/")
    return last in (CONFIG, TENSORS) and len(inside) <= 1 and not set(inside) & {"", ".", ".."} and "\\" not in name


def root_of(folder: Path) -> tuple[Path, str, Manifest | None]:
    """Return (root, what is before the names of `folder`'s files there, manifest) of the save that `folder` belongs to.

    One of several that were saved together belongs to the folder above. A damaged manifest there is ignored unless it
    names `folder`: the folder above may be anyone's.
    """
    here = Path(os.path.realpath(folder))
    try:
        above = read_manifest(here.parent)
    except CheckpointError:
        if os.path.lexists(here / MANIFEST) or not _may_name(here.parent / MANIFEST, here.name):
            return folder, "", read_manifest(folder)
        raise
    if above is not None and any(name.startswith(f"{here.name}/") for name in above.files):
        return folder.parent if folder.name == here.name else here.parent, f"{here.name}/", above
    return folder, "", read_manifest(folder)


def _may_name(file: Path, folder: str) -> bool:
    """Return whether a file that is not a manifest, perhaps since it was damaged, has the name of a folder in it."""
    try:
        return json.dumps(f"{folder}/")[1:-1].encode() in read_bytes(file, JSON_BYTES)
    except (CheckpointError, FileNotFoundError):
        return False


@dataclass(frozen=True)
class Folder:
    """An adapter folder, as it was when it was opened.

    Args:
        path: of the folder. prefix: of its files in the manifest.
        read: contents by path relative to the root, each read once.
        only: the name of the one file of it that is meant.
    """

    path: Path
    prefix: str
    manifest: Manifest | None
    read: dict[str, bytearray] = field(default_factory=dict)
    only: str | None = None

    @classmethod
    def opened(cls, path: Path) -> Folder:
        if os.path.lexists(path) and not os.path.isdir(path):
            return cls(path.parent, "", None, only=path.name)
        if not os.path.isdir(path):
            raise CheckpointError(f"there is no folder '{path}'")
        _, prefix, manifest = root_of(path)
        return cls(path, prefix, manifest)

    def inside(self, name: str) -> Folder:
        """A folder in it, of the same save."""
        return Folder(self.path / name, f"{self.prefix}{name}/", self.manifest, self.read)

    def folders(self) -> list[str]:
        """The names of folders in it that may hold adapters."""
        if self.manifest is not None and not self.prefix:
            return sorted({name.partition("/")[0] for name in self.manifest.files if "/" in name})
        try:
            return sorted(name for name in os.listdir(self.path) if os.path.isdir(self.path / name))
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be listed: {error.strerror}") from error

    def holds(self, name: str) -> bool:
        """Does the file belong to the save?"""
        if self.only is not None:
            return name == self.only
        if self.manifest is not None and name in (CONFIG, TENSORS):
            return self.prefix + name in self.manifest.files
        return os.path.exists(self.path / name)

    def content(self, name: str, limit: int | None = None) -> bytearray:
        """A file's bytes.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it cannot be read, or is not what was saved.
        """
        key = self.prefix + name
        if key not in self.read:
            if not self.holds(name):
                raise FileNotFoundError(name)
            file = self.path / name
            if self.manifest is not None and (wanted := self.manifest.files.get(key)) is not None:
                self.read[key] = _saved(self.manifest, file, wanted, limit)
            else:
                self.read[key] = read_bytes(file, limit)
        return self.read[key]

    def config(self) -> dict[str, Any]:
        """The fields of `adapter_config.json`.

        Raises:
            CheckpointError: there is none, or it is no adapter's.
        """
        file = self.path / CONFIG
        try:
            fields = parse_json(self._config(), file)
        except FileNotFoundError:
            raise CheckpointError(f"'{self.path}' holds no adapter: {CONFIG} is missing") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
            raise CheckpointError(f"'{file}' names no peft_type: it is no adapter in the format of Hugging Face PEFT")
        return fields

    def _config(self) -> bytearray:
        if self.manifest is None and self.holds(TENSORS):
            # Before there were manifests, a save that was killed left the config of its tensors beside the old one.
            beside = self.path / f".{CONFIG}.tmp"
            wanted = self.metadata().get(CONFIG_HASH) if os.path.isfile(beside) else None
            if wanted is not None and sha256(content := read_bytes(beside, JSON_BYTES)) == wanted:
                return content
        return self.content(CONFIG, JSON_BYTES)

    def tensors(self, name: str = TENSORS) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, metadata) of `adapter_model.safetensors`, or of another file of the folder.

        Raises:
            CheckpointError: there is none, or it is no whole one.
        """
        why = "a pickle, which can run any code and is never read here"
        if name.endswith(_PICKLES):
            raise CheckpointError(f"'{self.path / name}' is {why}. Have its author save it as safetensors")
        try:
            return parse_tensors(self.content(name), self.path / name)
        except FileNotFoundError:
            pickles = sorted(path.name for path in self.path.glob("*") if path.name.endswith(_PICKLES))
            if pickles:
                raise CheckpointError(
                    f"'{self.path}' holds '{pickles[0]}', {why}. "
                    f"Have its author save it as {name}, or convert it where you trust it"
                ) from None
            others = sorted(path for path in self.path.glob("*.safetensors") if path.name != TENSORS)
            hint = f". If '{others[0].name}' is one, give that file: '{others[0]}'" if others else ""
            raise CheckpointError(f"'{self.path}' holds no adapter: {name} is missing{hint}") from None

    def metadata(self) -> dict[str, str]:
        """The metadata of `adapter_model.safetensors`; empty where the folder has no such file."""
        if self.manifest is not None or self.prefix + TENSORS in self.read:
            return self.tensors()[1] if self.holds(TENSORS) else {}
        try:
            return parse_metadata(read_header(self.path / TENSORS), self.path / TENSORS)
        except FileNotFoundError:
            return {}

    def was_replaced(self) -> bool:
        """Has another save taken the place of the one that was opened?"""
        return self.only is None and root_of(self.path)[2] != self.manifest


def _saved(manifest: Manifest, file: Path, wanted: str, limit: int | None) -> bytearray:
    missing = True
    for candidate in (file, manifest.temporary(file), file):  # which may be renamed between two looks
        try:
            content = read_bytes(candidate, limit)
        except FileNotFoundError:
            continue
        missing = False
        if sha256(content) == wanted:
            return content
    what = "is missing" if missing else "is not what was saved: its hash is another"
    raise CheckpointError(
        f"'{file}', which '{MANIFEST}' names, {what}. Copy the folder again; where you changed it yourself, "
        f"delete '{MANIFEST}'"
    )


def read_folder(folder: Path, look: Callable[[Folder], T]) -> T:
    """What `look(folder)` finds, all of one save. It is called again where another process saved meanwhile.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        opened = Folder.opened(folder)
        try:
            found = look(opened)
            if opened.manifest is not None or not opened.was_replaced():
                return found
        except CheckpointError:
            if not opened.was_replaced():
                raise
        if time.monotonic() > deadline:
            raise CheckpointError(f"'{folder}' was saved to again and again for {PATIENCE} s. Load it afterwards")


def read_tensors(folder: Path, name: str = TENSORS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of `adapter_model.safetensors` in `folder`, or of another file there."""
    return read_folder(folder, lambda opened: opened.tensors(name))


def sha256(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()
