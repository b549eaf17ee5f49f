"""`saved`, `theirs`: folders of an adapter, as peftcore writes it and as others do."""

from pathlib import Path

import pytest
from support import tiny

import peftcore


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a saved adapter that triples q_proj."""
    return peftcore.save(peftcore.apply(tiny.llama(), "around", value=3.0), tmp_path / "adapter")


@pytest.fixture
def theirs(saved: Path) -> Path:
    """The same, as others write it: without the config's hash."""
    tiny.without_hash(saved)
    return saved
