"""Lists on disk have the values of lists in memory, and what is read from files stays on disk."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
from pathlib import Path

import pytest
from peftcore_cli.data import row_reading
from peftcore_cli.data.disk_list import DiskList, Selection
from peftcore_cli.data.row import Row
from support.commands import write_jsonl

from peftcore import PeftcoreError


def test_items_are_those_of_a_list() -> None:
    items = [Row("f:1", "é", completion="b"), {"a": [1.5, None]}, "", 3]
    on_disk = DiskList(items[:1])
    on_disk.extend(items[1:])
    assert list(on_disk) == items and len(on_disk) == 4 and not DiskList()
    assert [on_disk[i] for i in (-1, -4, 2)] == [3, items[0], ""]
    assert on_disk[1:3] == items[1:3] and on_disk[::-1] == items[::-1] and on_disk[7:] == []
    for index in (4, -5):
        with pytest.raises(IndexError):
            on_disk[index]
    selection = Selection(on_disk, [3, 1])
    assert list(selection) == [3, items[1]] and selection[-1:] == [items[1]]
    assert [selection.size(i) for i in (0, 1)] == [on_disk.size(3), on_disk.size(1)]


def test_a_forked_process_reads_without_moving_the_place_of_its_parent() -> None:
    on_disk = DiskList(range(100))
    child = os.fork()
    if not child:
        os._exit(0 if list(on_disk) == list(range(100)) else 1)
    assert list(on_disk) == list(range(100)) and os.waitpid(child, 0)[1] == 0


def test_rows_are_not_kept_in_memory(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {i}"} for i in range(50)])
    rows = row_reading.read(path, "causal-lm")[1]
    gc.collect()
    assert not [item for item in gc.get_objects() if type(item) is Row]
    assert [row.text for row in rows] == [f"text {i}" for i in range(50)]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk = DiskList([1])

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(on_disk, "_file", Full())
    with pytest.raises(PeftcoreError, match=r"temporary file: No space left on device\. .* set TMPDIR"):
        on_disk.extend([2])
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(PeftcoreError, match="temporary file: No such file or directory"):
        DiskList([1])
