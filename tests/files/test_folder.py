"""A save is whole or not there: killed anywhere, beside other writers and readers, with links in its way."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from support import fresh_process

from peftcore import CheckpointError
from peftcore.files import folder as folder_module
from peftcore.files.folder import SAVE, Content, Folder, read_folder, write_file

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
    save = opened.metadata().get(SAVE)
    parts = [opened.subfolder(name, save) if name else opened for name in names]
    found = {part.config()["value"] for part in parts}
    return found | {value for part in parts for value in part.tensors()[0]["gain"].tolist()}


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


ONE = ["adapter_config.json", "adapter_model.safetensors"]
ALL = sorted([*ONE, *(f"{name}/{file}" for name in "ab" for file in ONE)])


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
        Folder(folder).write(contents(1, names))
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
                Folder(folder).write(contents(2, names))
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
                Folder(folder).write(contents(3, names))
                allowed = [{3.0}]
            except Killed:
                allowed = [found, {3.0}]
        assert read_folder(folder, lambda opened: values(opened, names)) in allowed, step
        Folder(folder).write(contents(4, names))
        assert read_folder(folder, lambda opened: values(opened, names)) == {4.0}
        assert files(folder) == (ALL if len(names) > 1 else ONE)
    assert done and seen == {1.0, 2.0}


_KILLED = """
import os, random, signal, struct, sys, time
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_folder import contents, values
from peftcore.files.folder import Folder, read_folder

os.fsync = lambda descriptor: None  # slow, and a power cut is not tried here
folder = Path(sys.argv[1])
random.seed(0)
for attempt in range(80):
    told, tells = os.pipe()
    child = os.fork()
    while child == 0:
        for value in (2, 1):
            began = time.perf_counter()
            Folder(folder).write(contents(value))
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
        Folder(folder).write(contents(value))
        time.sleep(0.02)  # for the other one to get the lock


def test_writers_and_readers_side_by_side(tmp_path: Path, monkeypatch) -> None:
    """Every save succeeds, and a mixture is never read."""
    Folder(tmp_path).write(contents(1))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writer, args=(tmp_path, value), daemon=True) for value in (1, 2)]
    with open(os.devnull, "w") as nothing, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", nothing)
        for writer in writers:
            writer.start()
    found: list[set[float]] = []
    try:
        for number in range(5000):
            if number > 150 and {1.0} in found and {2.0} in found:
                break
            found.append(read_folder(tmp_path, values))
        assert all(writer.is_alive() for writer in writers)
    finally:
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    assert all(each in ({1.0}, {2.0}) for each in found)
    assert {1.0} in found and {2.0} in found


def test_an_error_for_a_writer_that_waits_too_long(tmp_path: Path, monkeypatch) -> None:
    Folder(tmp_path).write(contents(1))
    monkeypatch.setattr(folder_module, "PATIENCE", 0.1)
    with folder_module.lock_folders(tmp_path, tmp_path / "a"):
        for inside in ("", "a"):
            with pytest.raises(CheckpointError, match=r"was not saved: another process has been saving to"):
                Folder(tmp_path / inside).write(contents(2, [""]))
    assert read_folder(tmp_path, values) == {1.0}


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither at a temporary name, which cannot be guessed, nor at a final one."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ONE:
        (folder / name).symlink_to(outside)
        (folder / f".{name}.tmp").symlink_to(outside)
        (folder / f".{name}.{'0' * 16}.tmp").symlink_to(outside)
    Folder(folder).write(contents(1))
    assert outside.read_text() == "mine" and read_folder(folder, values) == {1.0}
    assert files(folder) == ALL and not any(path.is_symlink() for path in folder.rglob("*"))
    with pytest.raises(FileExistsError):
        folder_module.create_file(folder / "adapter_config.json", b"")


def test_no_adapter_is_written_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "set"
    outside.mkdir()
    folder.mkdir()
    (folder / "b").symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"'{folder}/b' is a link to '{outside}', outside the folder"):
        Folder(folder).write(contents(1))
    assert not files(outside) and not files(folder)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"])
def test_a_folder_that_cannot_be_named(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / name, tmp_path / name / "inside"):
        with pytest.raises(CheckpointError, match=r"the adapter could not be saved"):
            Folder(path).write(contents(1))
        with pytest.raises(CheckpointError, match=r"the adapter could not be saved"):
            write_file(path / "adapter.safetensors", b"")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"could not be saved to '.*file/run': Not a directory"):
        Folder(tmp_path / "file" / "run").write(contents(1))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    Folder(tmp_path).write(contents(1))
    before = files(tmp_path)
    os.unlink(tmp_path / "b" / "adapter_model.safetensors")
    (tmp_path / "b" / "adapter_model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"b/adapter_model.safetensors' is a folder, not a regular file"):
        Folder(tmp_path).write(contents(2))
    assert files(tmp_path) == [name for name in before if name != "b/adapter_model.safetensors"]
    assert read_folder(tmp_path, lambda opened: values(opened, ["", "a"])) == {1.0}


def test_a_save_that_fails_leaves_no_empty_folder(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr(folder_module, "create_file", full)
    for folder in (tmp_path / "new" / "deeper", there / "inside"):
        with pytest.raises(CheckpointError, match="No space left on device"):
            Folder(folder).write(contents(1))
        with pytest.raises(CheckpointError, match="No space left on device"):
            write_file(folder / "adapter.safetensors", b"content")
    assert list(tmp_path.rglob("*")) == [there]


def test_one_of_several_can_be_saved_again(tmp_path: Path) -> None:
    Folder(tmp_path).write(contents(1))
    Folder(tmp_path / "a").write(contents(2, [""]))
    assert read_folder(tmp_path / "a", lambda opened: values(opened, [""])) == {2.0}
    assert read_folder(tmp_path, values) == {1.0, 2.0}


def test_files_of_two_saves_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(folder_module, "_PAUSE", 0)
    for value in (1, 2):
        Folder(tmp_path / f"{value}").write(contents(value))
    os.replace(tmp_path / "2" / "b" / ONE[0], tmp_path / "1" / "b" / ONE[0])
    with pytest.raises(CheckpointError, match=r"b/adapter_config.json' and '.*' are from different saves: the"):
        read_folder(tmp_path / "1", values)
    os.replace(tmp_path / "2" / "b" / ONE[1], tmp_path / "1" / "b" / ONE[1])
    with pytest.raises(CheckpointError, match=r"and the other adapters of the folder are from different saves"):
        read_folder(tmp_path / "1", values)
    assert read_folder(tmp_path / "1" / "b", lambda opened: values(opened, [""])) == {2.0}


def test_a_config_may_be_formatted_and_name_another_base(tmp_path: Path) -> None:
    Folder(tmp_path).write(contents(1, [""]))
    fields = json.loads((tmp_path / ONE[0]).read_text())
    (tmp_path / ONE[0]).write_text(json.dumps({"base_model_name_or_path": "org/base", **fields}))
    (tmp_path / "peftcore_manifest.json").write_text("{")  # of an older version
    assert read_folder(tmp_path, lambda opened: values(opened, [""])) == {1.0}


def test_several_are_not_saved_beside_others_that_load_would_take(tmp_path: Path) -> None:
    Folder(tmp_path / "root").write(contents(1, [""]))
    Folder(tmp_path / "inside").write(contents(1, ["a", "b"]))
    for name, other in (("root", ""), ("inside", "/a")):
        message = f"'{tmp_path / name}{other}' contains an adapter of an earlier save"
        with pytest.raises(CheckpointError, match=message):
            Folder(tmp_path / name).write(contents(2, ["b", "c"]))
