"""Reading of a folder as one save left it, while other processes may save there at the same time.

The manifest has the hash of every file. By its hash a file is recognised that was not renamed into place yet, or was
replaced since: all that is read is of one save, or is read again. Without a manifest, reading is repeated if one
appears meanwhile.
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

from peftcore.errors import CheckpointError, nearest
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
PATIENCE = 60  # seconds for which other processes may save again and again before a reader gives up

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """The files of one save.

    Args:
        token: part of the temporary names of this save's files, which they may have until the save is done.
        files: {path relative to the folder: sha256}.
    """

    @classmethod
    def of(cls, files: dict[str, str]) -> Manifest:
        """Return the manifest of `files`, equal for equal files: the token is made from their hashes."""
        return cls(sha256(json.dumps(files, sort_keys=True).encode())[:16], files)

    token: str
    files: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return the content of the manifest's file."""
        return {"version": _VERSION, "save": self.token, "sha256": self.files}

    def temporary(self, file: Path) -> Path:
        """Return the name of `file` until it replaces the old one."""
        return temporary_name(file, self.token)


def temporary_name(file: Path, token: str) -> Path:
    """Return the name under which `file` is written, unique by a token of 16 hexadecimal digits."""
    return file.with_name(f".{file.name}.{token}.tmp")


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest in `folder` itself, or None.

    Raises:
        CheckpointError: the manifest cannot be read.
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
        raise CheckpointError(f"'{file}' is not a manifest. Copy the folder again, or save the adapter again")
    return Manifest(token, files)


def _names_a_file(name: str) -> bool:
    *inside, last = name.split("/")
    return last in (CONFIG, TENSORS) and len(inside) <= 1 and not set(inside) & {"", ".", ".."} and "\\" not in name


def root_of(folder: Path) -> tuple[Path, str, Manifest | None]:
    """Return (root, prefix of the folder's files in the manifest, manifest) of the save that `folder` belongs to.

    The root of adapters that were saved together is the folder above. A damaged manifest there is ignored unless it
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
    """Return whether a file that cannot be read as a manifest contains the name of a folder."""
    try:
        return json.dumps(f"{folder}/")[1:-1].encode() in read_bytes(file, JSON_BYTES)
    except (CheckpointError, FileNotFoundError):
        return False


@dataclass(frozen=True)
class Folder:
    """An adapter folder, as it was when it was opened. Each file is read and parsed once.

    Args:
        path: path of the folder.
        prefix: prefix of the folder's files in the manifest.
        manifest: the manifest of the save, or None.
        read: {path relative to the root: content}.
        only: name of the single file in the folder that is meant, or None.
        parsed: {path relative to the root: value of a JSON file, or (tensors, metadata)}.
    """

    path: Path
    prefix: str
    manifest: Manifest | None
    read: dict[str, bytearray] = field(default_factory=dict)
    only: str | None = None
    parsed: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path) -> Folder:
        """Open a folder, or a single file.

        Raises:
            CheckpointError: there is neither, or the manifest cannot be read.
        """
        if not os.path.isdir(path):
            if os.path.lexists(path):
                return cls(path.parent, "", None, only=path.name)
            raise CheckpointError(f"the folder '{path}' does not exist. {_instead_of(path)}")
        _, prefix, manifest = root_of(path)
        return cls(path, prefix, manifest)

    def inside(self, name: str) -> Folder:
        """Return a subfolder of the same save."""
        return Folder(self.path / name, f"{self.prefix}{name}/", self.manifest, self.read, parsed=self.parsed)

    def folders(self) -> list[str]:
        """Return the names of subfolders that may contain adapters."""
        if self.manifest is not None and not self.prefix:
            return sorted({name.partition("/")[0] for name in self.manifest.files if "/" in name})
        return [name for name in self.listed() if os.path.isdir(self.path / name)]

    def listed(self) -> list[str]:
        """Return the sorted names of everything in the folder; none if it was deleted.

        Raises:
            CheckpointError: the folder cannot be listed.
        """
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be listed: {error.strerror}") from error

    def has(self, name: str) -> bool:
        """Return whether the file belongs to the save."""
        if self.only is not None:
            return name == self.only
        if self.manifest is not None and name in (CONFIG, TENSORS):
            return self.prefix + name in self.manifest.files
        return os.path.exists(self.path / name)

    def content(self, name: str, limit: int | None = None) -> bytearray:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: the file does not exist.
            CheckpointError: it cannot be read, or is not what was saved.
        """
        key = self.prefix + name
        if key not in self.read:
            if not self.has(name):
                raise FileNotFoundError(name)
            file = self.path / name
            if self.manifest is not None and (wanted := self.manifest.files.get(key)) is not None:
                self.read[key] = _saved(self.manifest, file, wanted, limit)
            else:
                self.read[key] = read_bytes(file, limit)
        return self.read[key]

    def config(self) -> dict[str, Any]:
        """Return the fields of `adapter_config.json`.

        Raises:
            CheckpointError: the file is missing, or not that of an adapter.
        """
        file = self.path / CONFIG
        try:
            older = self.config_of_killed_save()
            fields = self.json(CONFIG) if older is None else parse_json(older, file)
        except FileNotFoundError:
            raise CheckpointError(
                f"'{self.path}' does not contain an adapter: {CONFIG} is missing{self._instead()}"
            ) from None
        if not isinstance(fields, dict):
            raise CheckpointError(f"'{file}' must be a JSON object, found {type(fields).__name__}. Copy it again")
        if not isinstance(fields.get("peft_type"), str):
            found = ", ".join(list(fields)[:8]) or "none"
            raise CheckpointError(
                f"'{file}' has no field peft_type (its fields: {found}), so it is not an adapter in the format of "
                "Hugging Face PEFT, and no installed plugin reads it as another library's. Save the adapter in PEFT's "
                "format, or install the plugin that reads it"
            )
        return dict(fields)

    def json(self, name: str) -> Any:
        """Return the value of a JSON file, which the caller must not change; errors are those of `content`."""
        key = self.prefix + name
        if key not in self.parsed:
            self.parsed[key] = parse_json(self.content(name, JSON_BYTES), self.path / name)
        return self.parsed[key]

    def config_of_killed_save(self) -> bytearray | None:
        """Return the config that belongs to the tensors, if a save was killed before it was in place.

        Before there were manifests, such a save left its config under another name, next to the old one.
        """
        aside = self.path / f".{CONFIG}.tmp"
        if self.manifest is not None or not os.path.isfile(aside) or not self.has(TENSORS):
            return None
        wanted = self.metadata().get(CONFIG_HASH)
        content = None if wanted is None else read_bytes(aside, JSON_BYTES)
        return content if content is not None and sha256(content) == wanted else None

    def tensors(self, name: str = TENSORS) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return (tensors, metadata) of `adapter_model.safetensors`, or of another file in the folder.

        Raises:
            CheckpointError: the file is missing or not complete.
        """
        why = "a pickle, which can run any code and is never read here"
        if name.endswith(_PICKLES):
            raise CheckpointError(f"'{self.path / name}' is {why}. Have its author save it as safetensors")
        key = self.prefix + name
        try:
            if key not in self.parsed:
                self.parsed[key] = parse_tensors(self.content(name), self.path / name)
            tensors, metadata = self.parsed[key]
            return dict(tensors), metadata
        except FileNotFoundError:
            pickles = sorted(path.name for path in self.path.glob("*") if path.name.endswith(_PICKLES))
            if pickles:
                raise CheckpointError(
                    f"'{self.path}' contains '{pickles[0]}', {why}. "
                    f"Have its author save it as {name}, or convert it where you trust it"
                ) from None
            raise CheckpointError(
                f"'{self.path}' does not contain an adapter: {name} is missing{self._instead()}"
            ) from None

    def _instead(self) -> str:
        """Return what the folder contains in place of an adapter, and what to do, as the end of a message."""
        names = self.listed()
        others = [name for name in names if name.endswith(".safetensors") and name != TENSORS]
        if others and not {"config.json", CONFIG} & {*names}:
            return f". If '{others[0]}' is one, give that file: '{self.path / others[0]}'"
        inside = next((name for name in ("adapter", *names) if os.path.isfile(self.path / name / CONFIG)), None)
        if inside is not None:
            return f". Its subfolder contains one: pass '{self.path / inside}'"
        if "config.json" in names:
            return ", and config.json is that of a model. Pass this folder as the base, and the one that `save` wrote"
        found = f"contains {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "is empty"
        return f"; it {found}. Pass the folder that `save` wrote, or copy the missing file into it"

    def metadata(self) -> dict[str, str]:
        """Return the metadata of `adapter_model.safetensors`; empty if the folder has no such file."""
        if self.manifest is not None or self.prefix + TENSORS in self.read:
            return self.tensors()[1] if self.has(TENSORS) else {}
        try:
            return parse_metadata(read_header(self.path / TENSORS), self.path / TENSORS)
        except FileNotFoundError:
            return {}

    def was_replaced(self) -> bool:
        """Return whether another save has replaced the one that was opened."""
        return self.only is None and root_of(self.path)[2] != self.manifest


def _instead_of(path: Path) -> str:
    """Return advice for a path at which there is no folder: similar names next to it, and what else can be passed."""
    found = []
    try:
        if not path.is_absolute():
            found.append(f"The path is relative to '{os.getcwd()}'. ")
        with os.scandir(path.parent) as there:
            similar = nearest(path.name, [each.name for each in there if each.is_dir()])
        found.append(f"In '{path.parent}' are others{similar}. " if similar else "")
    except FileNotFoundError:
        found.append(f"'{path.parent}' does not exist either. ")
    except (OSError, ValueError):  # it cannot be listed, or cannot be a path
        pass
    return f"{''.join(found)}Pass the folder that `save` wrote, or an id of Hugging Face's hub as a string, 'ORG/NAME'"


def _saved(manifest: Manifest, file: Path, wanted: str, limit: int | None) -> bytearray:
    missing = True
    for candidate in (file, manifest.temporary(file), file):  # it may be renamed between two looks
        try:
            content = read_bytes(candidate, limit)
        except FileNotFoundError:
            continue
        missing = False
        if sha256(content) == wanted:
            return content
    what = "is missing" if missing else "is not what was saved: its hash differs"
    raise CheckpointError(
        f"'{file}', which '{MANIFEST}' names, {what}. Copy the folder again; if you changed it yourself, "
        f"delete '{MANIFEST}'"
    )


def read_folder(folder: Path, look: Callable[[Folder], T]) -> T:
    """Return `look(folder)`, of one save; it is called again if another process has saved meanwhile.

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
    """Return (tensors, metadata) of `adapter_model.safetensors` in `folder`, or of another file in it."""
    return read_folder(folder, lambda opened: opened.tensors(name))


def sha256(content: bytes | bytearray) -> str:
    """Return the hexadecimal SHA-256 of `content`."""
    return hashlib.sha256(content).hexdigest()
