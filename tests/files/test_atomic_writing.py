"""A save is whole or not there: killed anywhere, beside other writers and readers, with links in its way."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import fresh_process
import pytest
import torch

from peftcore import CheckpointError
from peftcore.files import atomic_writing
from peftcore.files.atomic_writing import Content, write_adapters, write_file
from peftcore.files.folder import MANIFEST, Folder, read_folder

NAMES = ("", "a", "b")


def contents(value: float, names=NAMES) -> dict[str, Content]:
    """A set of adapters, all of one value; configs and tensors of another length for every value."""
    tensors = {"gain": torch.full((int(10 + value),), float(value))}
    return {
        name: Content({"peft_type": "X", "value": float(value), "more": "x" * int(value)}, tensors, {})
        for name in names
    }


def values(opened: Folder, names=NAMES) -> set[float]:
    """All values in a set."""
    parts = [opened.inside(name) if name else opened for name in names]
    found = {part.config()["value"] for part in parts}
    return found | {value for part in parts for value in part.tensors()[0]["gain"].tolist()}


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


ONE = ["adapter_config.json", "adapter_model.safetensors"]
ALL = sorted([*ONE, MANIFEST, *(f"{name}/{file}" for name in "ab" for file in ONE)])


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    write_adapters(tmp_path, contents(3))
    assert files(tmp_path) == ALL
    told = json.loads((tmp_path / MANIFEST).read_text())
    assert sorted(told["sha256"]) == [name for name in ALL if name != MANIFEST]
    assert read_folder(tmp_path, values) == {3.0}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("names", [("",), NAMES])
def test_killed_at_any_step(tmp_path: Path, monkeypatch, names) -> None:
    """At every call that changes the folder in turn; what then lies there is the old set or the new one, and so is
    what the next save that is killed leaves."""
    real = {name: getattr(os, name) for name in ("open", "replace", "unlink")}
    real["fsync"] = lambda descriptor: None  # slow, and a power cut is not tried here
    seen = set()
    for step in range(60):
        folder = tmp_path / f"{step}"
        write_adapters(folder, contents(1, names))
        left = step

        def counted(name, *args, **kwargs):
            nonlocal left
            left -= name != "open" or bool(args[1] & os.O_CREAT)
            if left < 0:
                raise Killed
            return real[name](*args, **kwargs)

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, lambda *args, name=name, **kwargs: counted(name, *args, **kwargs))
            try:
                write_adapters(folder, contents(2, names))
                done = True
            except Killed:
                done = False
        found = read_folder(folder, lambda opened: values(opened, names))
        assert found in ({1.0}, {2.0}), step
        seen |= found
        if done:
            break
        left = random.Random(step).randrange(20)
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, lambda *args, name=name, **kwargs: counted(name, *args, **kwargs))
            try:
                write_adapters(folder, contents(3, names))
                allowed = [{3.0}]
            except Killed:
                allowed = [found, {3.0}]
        assert read_folder(folder, lambda opened: values(opened, names)) in allowed, step
        write_adapters(folder, contents(4, names))
        assert read_folder(folder, lambda opened: values(opened, names)) == {4.0}
        assert files(folder) == (ALL if len(names) > 1 else sorted([*ONE, MANIFEST]))
    assert done and seen == {1.0, 2.0}


_KILLED = """
import os, random, signal, struct, sys, time
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_atomic_writing import contents, values
from peftcore.files.atomic_writing import write_adapters
from peftcore.files.folder import read_folder

os.fsync = lambda descriptor: None  # slow, and a power cut is not tried here
folder = Path(sys.argv[1])
random.seed(0)
for attempt in range(80):
    told, tells = os.pipe()
    child = os.fork()
    while child == 0:
        for value in (2, 1):
            began = time.perf_counter()
            write_adapters(folder, contents(value))
            os.write(tells, struct.pack("d", time.perf_counter() - began))
    for _ in range(random.choice((1, 2))):  # saves that it has finished; then a part of the next one
        (seconds,) = struct.unpack("d", os.read(told, 8))
    time.sleep(random.uniform(0, 1.2) * seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(told)
    os.close(tells)
    print(read_folder(folder, values))
"""


def test_sigkill_at_random_points(tmp_path: Path) -> None:
    """80 times, in a loop that saves two sets of three adapters by turns: what is there is one of the two."""
    here = Path(__file__).parent
    done = fresh_process.run(_KILLED, *map(str, (tmp_path / "set", here, here.parent)), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) == 80 and set(found) == {"{1.0}", "{2.0}"}


def _writer(folder: Path, value: int) -> None:
    while True:
        write_adapters(folder, contents(value))
        time.sleep(0.02)  # for the other one to get the lock


@pytest.mark.parametrize("locks", [True, False])
def test_writers_and_readers_side_by_side(tmp_path: Path, monkeypatch, locks: bool) -> None:
    """With locks every save succeeds; without, a mixture is possible on the disk, and is never read."""
    write_adapters(tmp_path, contents(1))
    context = multiprocessing.get_context("fork")
    if not locks:
        monkeypatch.setattr(atomic_writing, "fcntl", None)
        monkeypatch.setattr("peftcore.files.folder.PATIENCE", 1)
    writers = [context.Process(target=_writer, args=(tmp_path, value), daemon=True) for value in (1, 2)]
    with open(os.devnull, "w") as nothing, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", nothing)
        for writer in writers:
            writer.start()
    found: list[set[float]] = []
    try:
        for number in range(5000 if locks else 20):
            if number > 150 and {1.0} in found and {2.0} in found:
                break
            try:
                found.append(read_folder(tmp_path, values))
            except CheckpointError:
                assert not locks
        if locks:
            assert all(writer.is_alive() for writer in writers)
    finally:
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    assert all(each in ({1.0}, {2.0}) for each in found)
    if locks:
        assert {1.0} in found and {2.0} in found


def test_an_error_for_a_writer_that_waits_too_long(tmp_path: Path, monkeypatch) -> None:
    write_adapters(tmp_path, contents(1))
    monkeypatch.setattr(atomic_writing, "PATIENCE", 0.1)
    with atomic_writing.locked(tmp_path, NAMES):
        for inside in ("", "a"):
            with pytest.raises(CheckpointError, match=r"was not saved: another process has been saving to"):
                write_adapters(tmp_path / inside, contents(2, [""]))
    assert read_folder(tmp_path, values) == {1.0}


def test_an_error_for_two_writers_without_locks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(atomic_writing, "fcntl", None)
    real = atomic_writing.put_in_place

    def late(root, manifest):
        monkeypatch.setattr(atomic_writing, "put_in_place", real)
        write_adapters(tmp_path, contents(2))  # the other one, between our commit and our renames
        real(root, manifest)

    monkeypatch.setattr(atomic_writing, "put_in_place", late)
    with pytest.raises(CheckpointError, match=r"another process saved to .* at the same time"):
        write_adapters(tmp_path, contents(1))
    assert read_folder(tmp_path, values) == {2.0}


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither at a temporary name, which cannot be guessed, nor at a final one."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "set"
    folder.mkdir()
    for name in (*ONE, MANIFEST):
        (folder / name).symlink_to(outside)
        (folder / f".{name}.tmp").symlink_to(outside)
        (folder / f".{name}.{'0' * 16}.tmp").symlink_to(outside)
    write_adapters(folder, contents(1))
    assert outside.read_text() == "mine" and read_folder(folder, values) == {1.0}
    assert files(folder) == ALL and not any(path.is_symlink() for path in folder.rglob("*"))
    with pytest.raises(FileExistsError):
        atomic_writing.create(folder / "adapter_config.json", b"")


def test_no_adapter_is_written_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "set"
    outside.mkdir()
    folder.mkdir()
    (folder / "b").symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"'{folder}/b' is a link to '{outside}', and nothing is written"):
        write_adapters(folder, contents(1))
    assert not files(outside) and not files(folder)
    write_adapters(outside, contents(1, [""]))  # and what lies there is left alone, whatever a stranger's manifest says
    before = {name: (outside / name).read_bytes() for name in files(outside)}
    waiting = outside / f".adapter_config.json.{'0' * 16}.tmp"
    waiting.write_text("{}")
    told = {"version": 1, "save": "0" * 16, "sha256": {"b/adapter_config.json": "0" * 64}}
    (folder / MANIFEST).write_text(json.dumps(told))
    write_adapters(folder, contents(2, ["", "a"]))
    assert {name: (outside / name).read_bytes() for name in before} == before and waiting.exists()


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"])
def test_a_folder_that_cannot_be_named(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / name, tmp_path / name / "inside"):
        with pytest.raises(CheckpointError, match=r"the adapter could not be saved"):
            write_adapters(path, contents(1))
        with pytest.raises(CheckpointError, match=r"the adapter could not be saved"):
            atomic_writing.write_file(path / "adapter.safetensors", {}, {})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"could not be saved to '.*file/run': Not a directory"):
        write_adapters(tmp_path / "file" / "run", contents(1))
    assert (tmp_path / "file").read_text() == "mine"


GARBAGE = ["", "{", "[]", "null", '{"version": 1}', "\xff" * 100, "[" * 100_000, '{"save": "x", "sha256": {"a/x": 3}}']


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_the_folder_above_blocks_nothing(tmp_path: Path, garbage: str) -> None:
    folder = tmp_path / "mine"
    (tmp_path / MANIFEST).write_text(garbage)
    write_adapters(folder, contents(1, [""]))
    assert read_folder(folder, lambda opened: values(opened, [""])) == {1.0}
    (folder / MANIFEST).unlink()  # as from PEFT
    assert read_folder(folder, lambda opened: values(opened, [""])) == {1.0}
    write_adapters(folder, contents(2, [""]))
    assert (
        read_folder(folder, lambda opened: values(opened, [""])) == {2.0}
        and (tmp_path / MANIFEST).read_text() == garbage
    )


def test_a_pipe_in_the_folder_above_blocks_nothing(tmp_path: Path) -> None:
    write_adapters(tmp_path / "mine", contents(1, [""]))
    os.mkfifo(tmp_path / MANIFEST)
    assert read_folder(tmp_path / "mine", lambda opened: values(opened, [""])) == {1.0}


def test_a_damaged_manifest_above_that_names_the_folder_is_reported(tmp_path: Path) -> None:
    """The folder is one of several, and whether its files are those that were saved cannot be known any more."""
    write_adapters(tmp_path, contents(1))
    (tmp_path / MANIFEST).write_text((tmp_path / MANIFEST).read_text()[:-10])
    with pytest.raises(CheckpointError, match=rf"'{tmp_path}/{MANIFEST}' cannot be read as JSON"):
        read_folder(tmp_path / "b", lambda opened: values(opened, [""]))


def test_one_of_several_can_be_saved_again(tmp_path: Path) -> None:
    write_adapters(tmp_path, contents(1))
    write_adapters(tmp_path / "a", contents(2, [""]))
    assert read_folder(tmp_path / "a", lambda opened: values(opened, [""])) == {2.0}
    assert read_folder(tmp_path, lambda opened: values(opened, ["", "b"])) == {1.0}
    assert read_folder(tmp_path, values) == {1.0, 2.0}  # of one save each, in one manifest
    assert files(tmp_path) == ALL
    with pytest.raises(CheckpointError, match=r"it takes one adapter. Save several to another folder"):
        write_adapters(tmp_path / "a", contents(2))


def test_a_set_over_single_ones(tmp_path: Path) -> None:
    for name in NAMES:
        write_adapters(tmp_path / name, contents(1, [""]))
    assert files(tmp_path / "a") == sorted([*ONE, MANIFEST])
    write_adapters(tmp_path, contents(2, ["a", "b"]))
    assert read_folder(tmp_path, lambda opened: values(opened, ["a", "b"])) == {2.0}
    assert files(tmp_path / "a") == ONE
    with pytest.raises(CheckpointError, match="does not contain an adapter"):  # that of another save
        read_folder(tmp_path, lambda opened: opened.config())


@pytest.mark.parametrize("change", ["edit", "cut", "remove", "exchange"])
def test_what_was_changed_is_not_read_folder(tmp_path: Path, change: str) -> None:
    write_adapters(tmp_path, contents(1))
    file = tmp_path / "a" / "adapter_config.json"
    message = "a/adapter_config.json', which 'peftcore_manifest.json' names, is not what was saved"
    if change == "edit":
        file.write_text(file.read_text().replace("xx", "yy") + " ")
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:5])
    elif change == "remove":
        file.unlink()
        message = "names, is missing"
    else:
        write_adapters(tmp_path / "other", contents(2, [""]))
        os.replace(tmp_path / "other" / "adapter_config.json", file)
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path, values)
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path / "a", lambda opened: values(opened, [""]))
    if change == "exchange":
        (tmp_path / MANIFEST).unlink()
        assert read_folder(tmp_path, values) == {1.0, 2.0}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("3", "is not a manifest"),
        ('{"version": 2}', "written by a newer peftcore"),
        ('{"version": 1, "save": "../../../../etc", "sha256": {}}', "is not a manifest"),
        ('{"version": 1, "save": "0123456789abcdef", "sha256": {"../adapter_config.json": "%s"}}' % ("0" * 64),
         "is not a manifest"),
        ('{"version": 1, "save": "0123456789abcdef", "sha256": {"adapter_config.json": 3}}', "is not a manifest"),
    ],
)  # fmt: skip
def test_a_manifest_is_not_trusted(tmp_path: Path, told: str, message: str) -> None:
    write_adapters(tmp_path, contents(1))
    (tmp_path / MANIFEST).write_text(told)
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path, values)
    write_adapters(tmp_path, contents(2))
    assert read_folder(tmp_path, values) == {2.0}


def test_a_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    write_adapters(tmp_path, contents(1))
    before = files(tmp_path)
    os.unlink(tmp_path / "b" / "adapter_model.safetensors")
    (tmp_path / "b" / "adapter_model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"b/adapter_model.safetensors' is a folder"):
        write_adapters(tmp_path, contents(2))
    assert files(tmp_path) == [name for name in before if name != "b/adapter_model.safetensors"]
    assert read_folder(tmp_path, lambda opened: values(opened, ["", "a"])) == {1.0}


def test_a_save_that_fails_leaves_no_empty_folder(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr(atomic_writing, "create", full)
    for folder in (tmp_path / "new" / "deeper", there / "inside"):
        with pytest.raises(CheckpointError, match="No space left on device"):
            write_adapters(folder, contents(1))
        with pytest.raises(CheckpointError, match="No space left on device"):
            write_file(folder / "adapter.safetensors", {"gain": torch.ones(1)}, {})
    assert list(tmp_path.rglob("*")) == [there]


def test_a_killed_save_of_older_versions(tmp_path: Path) -> None:
    """They left new tensors, and the new config under its temporary name."""
    write_adapters(tmp_path / "old", contents(1, [""]))
    write_adapters(tmp_path / "new", contents(2, [""]))
    (tmp_path / "old" / MANIFEST).unlink()
    os.replace(tmp_path / "new" / "adapter_model.safetensors", tmp_path / "old" / "adapter_model.safetensors")
    os.replace(tmp_path / "new" / "adapter_config.json", tmp_path / "old" / ".adapter_config.json.tmp")
    assert read_folder(tmp_path / "old", lambda opened: values(opened, [""])) == {2.0}
