"""What libraries take inside products: read from the file of this machine, or the most that was seen anywhere."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from peftcore.estimating import libraries
from peftcore.estimating.costs import Cost, Kept, kept
from peftcore.estimating.libraries import OUTER, PLAIN, Libraries

MADE = Libraries(((64, 10, 5), (1024, 300, 200)), {"bfloat16": (70, 40)}, {f"bfloat16 {OUTER}": 4.0})


def test_is_read_from_the_file_of_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "libraries.json"
    file.write_text(json.dumps({"here": MADE._asdict()}))
    assert libraries.read_or_measured("here", file) == MADE


@pytest.mark.parametrize("printed", [b"", b"[]", b'{"panels": [], "code": {}, "scratch": {}}'])
def test_the_most_is_taken_where_nothing_can_be_measured(
    printed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 0, printed)

    monkeypatch.setattr(subprocess, "run", run)
    file = tmp_path / "libraries.json"
    assert libraries.read_or_measured(f"of {printed!r}", file) is libraries.MOST_SEEN and not file.exists()


def test_panels_count_once_and_code_for_each_shape() -> None:
    wide, narrow = (Cost(product=(8, 8, columns, PLAIN), dtype="float32") for columns in (65, 64))
    one, other = (Cost(product=(8, 8, 8, layout), dtype="bfloat16") for layout in (PLAIN, OUTER))
    assert kept([narrow, narrow], MADE) == Kept(10, 5)
    assert kept([narrow, wide], MADE) == Kept(300, 200)
    assert kept([one, one, other, Cost(kept=1000)], MADE) == Kept(1140, 1080)
    assert MADE.of_columns(1 << 20) == (300, 200)


def test_nothing_of_this_machine_on_a_card() -> None:
    products = [Cost(product=(8, 8, 8, PLAIN), dtype=str(t).removeprefix("torch.")) for t in (torch.half, torch.float)]
    assert kept(products, libraries.OF_A_CARD) == Kept(0, 0)
