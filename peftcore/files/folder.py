"""Adapter folders, which are read and written safely while other processes may save to them.

    adapter_config.json, adapter_model.safetensors              an adapter
    NAME/adapter_config.json, NAME/adapter_model.safetensors    further adapters of the same save
    README.md                                                   the model card

A save writes every file under a temporary name, then renames them, starting with the tensors. Renaming the first
tensors' file completes the save. The metadata of the tensors contains the hash of their config and, if several adapters
are saved, the id of the save. A reader uses them to find the other files under their temporary names until these are
renamed. A process that is killed at any point therefore leaves either the old adapter or the new one. A reader that
finds files of two saves reads again. Folders of other libraries have no hash and are read as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from safetensors.torch import save as serialized
from torch import Tensor

from peftcore.errors import CheckpointError, PeftcoreError, nearest
from peftcore.plugin.safe_reading import (
    CONFIG,
    JSON_BYTES,
    TENSORS,
    parse_json,
    parse_metadata,
    parse_tensors,
    read_bytes,
    read_header,
    require_regular,
)

CARD = "README.md"
LOCK = ".peftcore.lock"  # lock file, which exists during a save
CONFIG_HASH = "peftcore_config_hash"  # metadata of the tensors: hash of their config
SAVE = "peftcore_save"  # metadata of the tensors: id of a save of several adapters
PATIENCE = 120.0  # seconds to wait for another process that saves to the same folder
_ATTEMPTS, _PAUSE = 10, 0.1  # attempts to read while another process saves, and seconds between them
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Fields that a user may edit, because they do not change the meaning of the tensors.
_EDITABLE = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode")

T = TypeVar("T")


class TwoSavesError(CheckpointError):
    """The files of a folder are from two saves. If another process is saving, reading again helps."""


@dataclass(frozen=True)
class Content:
    """Content of one adapter's files.

    Args:
        fields: fields of `adapter_config.json`.
        tensors: tensors by their names on disk, contiguous and on the CPU.
        metadata: metadata of the tensors' file.
    """

    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Folder:
    """An adapter folder. Each file is read and parsed once.

    Args:
        path: path of the folder.
        only: name of the only file to read, or None for all.
        save: id of the save of several adapters that the folder must belong to, or None.
        read: {path: content} of the files read so far.
        parsed: {path: value of a JSON file, or (tensors, metadata)}.
    """

    path: Path
    only: str | None = None
    save: str | None = None
    read: dict[Path, bytearray] = field(default_factory=dict)
    parsed: dict[Path, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Open a folder, or a single file.

        Raises:
            CheckpointError: the path does not exist.
        """
        if os.path.isdir(path):
            return cls(path)
        if os.path.lexists(path):
            return cls(path.parent, path.name)
        raise CheckpointError(f"the folder '{path}' does not exist. {_advice_for_missing(path)}")

    def subfolder(self, name: str, save: str | None = None) -> Folder:
        """Return a subfolder; `save` is the id of the save that it must belong to."""
        return Folder(self.path / name, None, save, self.read, self.parsed)

    def subfolders(self) -> list[str]:
        """Return the names of the subfolders."""
        return [name for name in self.list_names() if os.path.isdir(self.path / name)]

    def list_names(self) -> list[str]:
        """Return the sorted names of all files and folders in the folder; empty if it was deleted.

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
        """Return whether the folder contains the file."""
        if self.only is not None:
            return name == self.only
        return os.path.exists(self.path / name) or (name == TENSORS and os.path.exists(self._tensors_file()))

    def content(self, name: str, limit: int | None = None) -> bytearray:
        """Return a file's bytes. For `adapter_config.json`, return the version that belongs to the tensors.

        Raises:
            FileNotFoundError: the file does not exist.
            CheckpointError: the file cannot be read, or is not from the same save as the tensors.
        """
        file = self.path / name
        if file not in self.read:
            if not self.has(name) and name != CONFIG:
                raise FileNotFoundError(name)
            if self.only is None and name == CONFIG:
                self.read[file] = self._config_of_tensors()[1]
            else:
                self.read[file] = self._read(self._tensors_file() if name == TENSORS else file, file, limit)
        return self.read[file]

    def config(self) -> dict[str, Any]:
        """Return the fields of `adapter_config.json`.

        Raises:
            CheckpointError: the file is missing, not from the same save as the tensors, or not an adapter's config.
        """
        file = self.path / CONFIG
        try:
            fields = self.json(CONFIG)
        except FileNotFoundError:
            raise CheckpointError(
                f"'{self.path}' does not contain an adapter: {CONFIG} is missing{self._describe_contents()}"
            ) from None
        if not isinstance(fields, dict):
            raise CheckpointError(f"'{file}' must be a JSON object, found {type(fields).__name__}. Copy it again")
        if not isinstance(fields.get("peft_type"), str):
            names = ", ".join(list(fields)[:8]) or "none"
            raise CheckpointError(
                f"'{file}' has no field peft_type (its fields: {names}), so it is not an adapter in PEFT's format, "
                "and no installed plugin recognizes it as another library's format. Save the adapter in PEFT's "
                "format, or install a plugin that reads its format"
            )
        return dict(fields)

    def json(self, name: str) -> Any:
        """Return the value of a JSON file, which the caller must not change. Raises the errors of `content`."""
        file = self.path / name
        if file not in self.parsed:
            self.parsed[file] = parse_json(self.content(name, JSON_BYTES), file)
        return self.parsed[file]

    def tensors(self, name: str = TENSORS) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return (tensors, metadata) of `adapter_model.safetensors`, or of another file in the folder.

        Raises:
            CheckpointError: the file is missing, incomplete, or not from the same save as the files read before.
        """
        reason = "a pickle, which can run arbitrary code, so peftcore never reads it"
        file = self.path / name
        if name.endswith(_PICKLES):
            raise CheckpointError(f"'{file}' is {reason}. Ask its author to save it as safetensors")
        try:
            if file not in self.parsed:
                tensors, metadata = parse_tensors(self.content(name), file)
                if name == TENSORS:
                    self._check_save(metadata)
                self.parsed[file] = tensors, metadata
            tensors, metadata = self.parsed[file]
            return dict(tensors), metadata
        except FileNotFoundError:
            pickles = sorted(path.name for path in self.path.glob("*") if path.name.endswith(_PICKLES))
            if pickles:
                raise CheckpointError(
                    f"'{self.path}' contains '{pickles[0]}', {reason}. Ask its author to save it as {name}, or "
                    "convert it yourself if you trust it"
                ) from None
            raise CheckpointError(
                f"'{self.path}' does not contain an adapter: {name} is missing{self._describe_contents()}"
            ) from None

    def metadata(self) -> dict[str, str]:
        """Return the metadata of `adapter_model.safetensors`; empty if the folder has no such file."""
        header = self._header()
        if header not in self.parsed:
            file = self.path / TENSORS
            try:
                start = self.read.get(file) or self._read(self._tensors_file(), file, None, read_header)
                self._check_save(parse_metadata(start, file))
            except FileNotFoundError:
                self.parsed[header] = {}
        metadata: dict[str, str] = self.parsed[header]
        return metadata

    def _header(self) -> Path:
        """Return the metadata's key in `parsed`. Metadata can be read without the tensors."""
        return self.path / TENSORS / "metadata"

    def _check_save(self, metadata: dict[str, str]) -> None:
        """Record the tensors' metadata. Raise a TwoSavesError if earlier reads were from another save."""
        saved_alone = metadata.get(SAVE) is None
        if not (self.save is None or saved_alone or metadata[SAVE] == self.save):
            raise TwoSavesError(
                f"'{self.path / TENSORS}' and the other adapters of the folder are from different saves. Copy the "
                "folder again, or save all adapters again"
            )
        if self.parsed.setdefault(self._header(), metadata) != metadata:
            raise TwoSavesError(
                f"another process kept saving to '{self.path}' while it was being read. Load the adapter when no "
                "process is saving to the folder"
            )

    def _tensors_file(self) -> Path:
        """Return the tensors' file, under its temporary name if a save of several adapters has not renamed it yet."""
        file = self.path / TENSORS
        if self.save is not None and re.fullmatch("[0-9a-f]{16}", self.save):
            waiting = _temporary_name(file, self.save)
            return waiting if os.path.lexists(waiting) else file
        return file

    def _config_of_tensors(self) -> tuple[Path, bytearray]:
        """Return (file, content) of the config that belongs to the tensors, even if it has not been renamed yet."""
        file = self.path / CONFIG
        expected_hash = self.metadata().get(CONFIG_HASH)
        content = None
        if expected_hash is None:
            return file, read_bytes(file, JSON_BYTES)
        waiting = [_temporary_name(file, expected_hash[:16])] if re.fullmatch("[0-9a-f]{64}", expected_hash) else []
        for candidate in (file, *waiting, file):  # another process may rename it in between
            with contextlib.suppress(FileNotFoundError):
                content = read_bytes(candidate, JSON_BYTES)
                if _hash(parse_json(content, file)) == expected_hash:
                    return candidate, content
        if content is None:
            raise FileNotFoundError(CONFIG)
        raise TwoSavesError(
            f"'{file}' and '{TENSORS}' are from different saves: the tensors were saved with another config. Copy "
            "the folder again, or save the adapter again. If you edited the config, undo the edit; only "
            f"{', '.join(_EDITABLE)} may be edited"
        )

    @staticmethod
    def _read(file: Path, final: Path, limit: int | None, read: Callable[..., bytearray] = read_bytes) -> bytearray:
        """Read a file that another process may rename to `final` in the meantime."""
        arguments = () if read is read_header else (limit,)
        try:
            return read(file, *arguments)
        except FileNotFoundError:
            return read(final, *arguments)

    def _describe_contents(self) -> str:
        """Return the end of an error message: what the folder contains instead of an adapter, and what to do."""
        names = self.list_names()
        others = [name for name in names if name.endswith(".safetensors") and name != TENSORS]
        if others and not {"config.json", CONFIG} & {*names}:
            return f". If '{others[0]}' is an adapter, pass that file: '{self.path / others[0]}'"
        inside = next((name for name in ("adapter", *names) if os.path.isfile(self.path / name / CONFIG)), None)
        if inside is not None:
            return f". Its subfolder contains an adapter: pass '{self.path / inside}'"
        if "config.json" in names:
            return (
                ", and its config.json belongs to a model, so this is the folder of a base model. Pass the folder "
                "that `save` wrote"
            )
        content = "is empty"
        if names:
            content = f"contains {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "")
        return f"; it {content}. Pass the folder that `save` wrote, or copy the missing file into it"

    def write(self, adapters: Mapping[str, Content], card: str | None = None) -> None:
        """Write adapters to subfolders with their names, all or none. The adapter "" is written to the folder itself.

        Args:
            adapters: content by name.
            card: text of README.md, or None to leave that file unchanged.

        Raises:
            CheckpointError: the adapters cannot be written. The message describes the state of the folder.
        """
        folders = {name: self.path / name for name in sorted(adapters)}
        with _naming_errors(self.path):
            for name, path in folders.items():
                if name:
                    _refuse_link(path)
                for file in (TENSORS, CONFIG, LOCK):
                    _refuse_special(path / file)
            with created_folders(self.path, *folders.values()), lock_folders(self.path, *folders.values()):
                if "" not in adapters:
                    self._refuse_mixture(adapters)
                self._finish_renames(adapters)
                self._write(adapters, card)

    def _refuse_mixture(self, adapters: Mapping[str, Content]) -> None:
        """Raise a CheckpointError if the folder has adapters of another save, since `load` would load them as well."""
        other = self.path if self.has(TENSORS) or self.has(CONFIG) else None
        for name in self.subfolders():
            with contextlib.suppress(CheckpointError):
                if name not in adapters and SAVE in self.subfolder(name).metadata():
                    other = self.path / name
        if other is not None:
            raise CheckpointError(
                f"the adapters {', '.join(adapters)} were not saved: '{other}' contains an adapter of an earlier "
                f"save, which `load` would load together with them. Save to another folder, or delete '{other}'"
            )

    def _finish_renames(self, adapters: Mapping[str, Content]) -> None:
        """Rename the temporary files of an earlier save that was killed after completion but before renaming them."""
        with contextlib.suppress(CheckpointError):
            save = Folder(self.path).metadata().get(SAVE)
            for name in adapters:
                with contextlib.suppress(CheckpointError, FileNotFoundError):
                    inside = Folder(self.path / name, save=save)
                    if inside._tensors_file() != inside.path / TENSORS:
                        os.replace(inside._tensors_file(), inside.path / TENSORS)
                    config, _ = inside._config_of_tensors()
                    if config != inside.path / CONFIG:
                        os.replace(config, inside.path / CONFIG)

    def _write(self, adapters: Mapping[str, Content], card: str | None) -> None:
        save = secrets.token_hex(8)
        files: list[tuple[Path, Path]] = []  # (temporary name, name)
        configs: list[tuple[Path, Path]] = []
        try:
            for name in sorted(adapters):
                content, path = adapters[name], self.path / name
                config = json.dumps(content.fields, indent=2, sort_keys=True).encode() + b"\n"
                digest = _hash(json.loads(config))
                metadata = {"format": "pt", **content.metadata, CONFIG_HASH: digest}
                if len(adapters) > 1:
                    metadata[SAVE] = save
                files.append((_temporary_name(path / TENSORS, save), path / TENSORS))
                create_file(files[-1][0], to_bytes(content.tensors, metadata))
                configs.append((_temporary_name(path / CONFIG, digest[:16]), path / CONFIG))
                configs[-1][0].unlink(missing_ok=True)
                create_file(configs[-1][0], config)
            files += configs
            if card is not None:
                files.append((_temporary_name(self.path / CARD, save), self.path / CARD))
                create_file(files[-1][0], card.encode())
            for path in dict.fromkeys(final.parent for _, final in files):
                _delete_temporary(path, {temporary for temporary, _ in files})
                _sync(path)
            os.replace(*files[0])  # from now on, readers find the new adapters
        except BaseException:
            if files and os.path.lexists(files[0][0]):
                for temporary, _ in (*files, *configs):
                    temporary.unlink(missing_ok=True)
            raise
        _sync(self.path)
        try:
            for temporary, final in files[1:]:
                os.replace(temporary, final)
                _sync(final.parent)
        except OSError as error:
            raise CheckpointError(
                f"the adapter is saved in '{self.path}' and peftcore can load it, but a file could not be renamed "
                f"({error.strerror or error}), so other programs will not find the adapter. Save it again"
            ) from error


def read_folder(folder: Path, look: Callable[[Folder], T]) -> T:
    """Return `look(folder)`, retried a few times if the files are from two saves.

    Raises:
        CheckpointError: files are missing, damaged, or from two saves.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return look(Folder.open(folder))
        except TwoSavesError:
            time.sleep(_PAUSE)
    return look(Folder.open(folder))


def read_tensors(folder: Path, name: str = TENSORS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of `adapter_model.safetensors` in `folder`, or of another file in it."""
    return read_folder(folder, lambda opened: opened.tensors(name))


def write_file(file: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with _naming_errors(file):
        _refuse_special(file)
        temporary = _temporary_name(file, secrets.token_hex(8))
        with created_folders(file.parent):
            try:
                create_file(temporary, content)
                os.replace(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
            _sync(file.parent)


@contextlib.contextmanager
def created_folders(*folders: Path) -> Iterator[None]:
    """Create `folders` and their parents. If the block raises, remove the folders that were created and are empty."""
    paths = chain.from_iterable((folder, *folder.parents) for folder in folders)
    new = {path for path in paths if not path.exists()}
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in sorted(new, key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):  # the folder is not empty
                path.rmdir()
        raise


@contextlib.contextmanager
def lock_folders(*folders: Path) -> Iterator[None]:
    """Prevent other processes from saving to `folders`.

    Raises:
        CheckpointError: another process has been saving there for `PATIENCE` seconds.
    """
    with contextlib.ExitStack() as locks:
        for folder in dict.fromkeys(folders):
            try:
                locks.enter_context(FileLock(folder / LOCK, timeout=PATIENCE))
            except Timeout:
                raise CheckpointError(
                    f"the adapter was not saved: another process has been saving to '{folder}' for {PATIENCE:g} s. "
                    "Save to another folder"
                ) from None
            # Delete the file before it is unlocked. A process that waits for the deleted file creates a new one.
            locks.callback(_delete_lock, folder / LOCK)
        yield


def _delete_lock(file: Path) -> None:
    with contextlib.suppress(OSError):  # Windows cannot delete an open file
        file.unlink()


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file.

    The metadata is sorted, since its order is not deterministic otherwise.
    """
    content = serialized(dict(tensors), dict(metadata))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[8 + size :]])


def create_file(file: Path, content: bytes) -> None:
    """Create a file and sync it to disk. Raises FileExistsError if the name exists, so that no link is followed."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with open(descriptor, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _temporary_name(file: Path, token: str) -> Path:
    """Return the temporary name of `file`, made unique by a token of 16 hexadecimal digits."""
    return file.with_name(f".{file.name}.{token}.tmp")


def _delete_temporary(folder: Path, needed: Iterable[Path]) -> None:
    """Delete the temporary files of earlier saves."""
    names = "|".join(map(re.escape, (CONFIG, TENSORS, CARD)))
    for file in folder.iterdir():
        if re.fullmatch(rf"\.({names})(\.[0-9a-f]{{16}})?\.tmp", file.name) and file not in needed:
            file.unlink(missing_ok=True)


def _hash(fields: object) -> str:
    """Return the SHA-256 of a config's fields, excluding those that a user may edit."""
    if isinstance(fields, dict):
        fields = {name: value for name, value in fields.items() if name not in _EDITABLE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _naming_errors(path: Path) -> Iterator[None]:
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
        raise CheckpointError(f"the adapter could not be saved: {str(path)!a} is not a valid path ({error})") from error


def _refuse_link(folder: Path) -> None:
    """Raise a CheckpointError if an adapter's subfolder is a link to another place."""
    if os.path.islink(folder):
        raise CheckpointError(
            f"'{folder}' is a link to '{os.path.realpath(folder)}', outside the folder to save to. Delete the link, "
            "or save to another folder"
        )


def _refuse_special(file: Path) -> None:
    """Raise a CheckpointError if `file` is a folder, a pipe or a device. A link may be replaced."""
    with contextlib.suppress(FileNotFoundError):
        if not os.path.islink(file):
            try:
                require_regular(file, os.lstat(file).st_mode)
            except CheckpointError as error:
                raise CheckpointError(
                    f"the adapter was not saved: {error}. Delete it, or save to another folder"
                ) from None


def _advice_for_missing(path: Path) -> str:
    """Return advice for a path that does not exist: sibling folders with similar names, and what to pass instead."""
    hints = []
    try:
        if not path.is_absolute():
            hints.append(f"The path is relative to '{os.getcwd()}'. ")
        with os.scandir(path.parent) as entries:
            similar = nearest(path.name, [entry.name for entry in entries if entry.is_dir()])
        hints.append(f"'{path.parent}' contains other folders{similar}. " if similar else "")
    except FileNotFoundError:
        hints.append(f"Its parent '{path.parent}' does not exist either. ")
    except (OSError, ValueError):  # the parent cannot be listed, or the text cannot be a path
        pass
    return f"{''.join(hints)}Pass the folder that `save` wrote, or a Hugging Face Hub id as a string, 'ORG/NAME'"


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
