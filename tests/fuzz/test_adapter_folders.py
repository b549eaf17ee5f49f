"""1,000 mutated adapter folders (each tenth in `make test`): the right model, or a CheckpointError.

Right is what `by_hand` computes from the same files. A config that does not belong to its tensors is refused.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from fuzz import by_hand, corpus, folders
from support import tiny
from torch import Tensor

import peftcore

COUNT = 1000
TOKENS = tiny.TOKENS % 32  # the smallest vocabulary


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders.originals(tmp_path_factory.mktemp("originals"))


def close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    if not found.isfinite().all() or not wanted.isfinite().all():
        return bool((found.isfinite() == wanted.isfinite()).all())
    return bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-5)


class Base:
    """One model a kind, on which folder after folder is loaded."""

    def __init__(self, kind: str) -> None:
        self.kind, self.model = kind, folders.model_for(kind)
        self.before = self.logits()
        self.keys = list(self.model.state_dict())

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(TOKENS).logits

    def check(self) -> None:
        """The model is what it was."""
        assert list(self.model.state_dict()) == self.keys and torch.equal(self.logits(), self.before)


def test_what_lies_in_the_originals(originals: dict[str, Path]) -> None:
    """The oracle is right where nothing was changed."""
    for kind, folder in originals.items():
        base = Base(kind)
        peftcore.load(base.model, folder)
        found = base.logits()
        assert close(found, by_hand.logits(folders.model_for(kind), folder, TOKENS)), kind
        assert (found - base.before).abs().max() > 0.01, kind


@pytest.mark.filterwarnings("ignore:.* was written by the method")
def test_mutated_folders(originals: dict[str, Path], tmp_path: Path) -> None:
    bases = {kind: Base(kind) for kind in originals}
    wanted = {}
    for kind, folder in originals.items():
        peftcore.load(bases[kind].model, folder)
        wanted[kind] = bases[kind].logits()
        _remove_all(bases[kind])

    def case(number: int, rng: random.Random) -> str:
        kind = rng.choice(sorted(originals))
        folder = Path(shutil.copytree(originals[kind], tmp_path / "folder"))
        try:
            hashed = kind != "adapterhub" and rng.random() < 0.25
            if kind != "adapterhub" and not hashed:
                tiny.without_hash(folder)
            mutation = rng.choice(folders.MUTATIONS)
            mutation(rng, folder)
            said = f"{kind}, {mutation.__name__}{', with its hash' if hashed else ''}: "
            return _outcome(bases[kind], folder, wanted[kind], said)
        finally:
            shutil.rmtree(folder)

    corpus.report("adapter folders", COUNT, case)


def _outcome(base: Base, folder: Path, wanted: Tensor, said: str) -> str:
    try:
        peftcore.load(base.model, folder)
    except peftcore.CheckpointError as error:
        assert str(folder) in str(error) or "peftcore_base" in str(error), f"{said}names no file: {error}"
        base.check()
        return "refused"
    except peftcore.PluginError:
        base.check()
        return "unknown method"
    except BaseException as error:
        if peftcore.engine.state_of(base.model) is not None:
            _remove_all(base)
        raise AssertionError(f"{said}{type(error).__name__}: {error}") from error
    try:
        found = base.logits()
    finally:
        _remove_all(base)
    base.check()
    try:
        right = by_hand.logits(folders.model_for(base.kind), folder, TOKENS)
    except Exception as error:
        if torch.equal(found, wanted):  # such as the file of a save that was killed, under its temporary name
            return "the same"
        raise AssertionError(f"{said}loaded, but by hand: {type(error).__name__}: {error}") from error
    assert close(found, right), f"{said}differs from what the files say by {(found - right).abs().max().item():.3g}"
    return "the same" if torch.equal(found, wanted) else "another adapter"


def _remove_all(base: Base) -> None:
    for name in list(peftcore.engine.state_of(base.model).applied):
        peftcore.remove(base.model, name)
