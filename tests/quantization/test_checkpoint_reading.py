"""Changes of the process while a checkpoint is read, by threads that overlap."""

from __future__ import annotations

import os

import pytest
import transformers.modeling_utils as reader

from peftcore.quantization.checkpoint_reading import not_mapped, read_when_needed


@pytest.mark.parametrize("before", [None, "0"])
def test_blocks_that_overlap_leave_the_process_as_it_was(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name, opened = "HF_DEACTIVATE_ASYNC_LOAD", reader.safe_open
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    blocks = [(read_when_needed(), not_mapped()) for _ in range(2)]
    for block in blocks:
        for each in block:
            each.__enter__()
    for number, block in enumerate(blocks):  # the first one leaves first
        assert os.environ[name] == "1" and reader.safe_open is not opened, number
        for each in block:
            each.__exit__(None, None, None)
    assert os.environ.get(name) == before and reader.safe_open is opened
