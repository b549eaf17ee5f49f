"""What `save_pretrained` means on a model with adapters, and a Trainer that is imported late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import fresh_process, tiny
from transformers import AutoModelForCausalLM

import peftcore

pytestmark = pytest.mark.usefixtures("toys")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_saves_the_adapter(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "around", value=3.0)
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert torch.equal(tiny.logits(peftcore.load(tiny.llama(), tmp_path)), tiny.logits(model))


@pytest.mark.parametrize("keep", [True, False])
def test_after_merge_it_saves_the_merged_model(keep: bool, tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "around", value=3.0)
    peftcore.apply(model, "train", adapter="second", names=("model.norm.weight",))
    wanted = tiny.logits(model)
    peftcore.merge(model, undo=keep)
    model.save_pretrained(tmp_path)
    assert "adapter_config.json" not in files(tmp_path)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["unexpected_keys"] and not told["missing_keys"]
    torch.testing.assert_close(tiny.logits(loaded), wanted, atol=1e-5, rtol=1e-5)


def test_without_adapters_it_is_as_ever(tmp_path: Path) -> None:
    model = peftcore.remove(peftcore.apply(tiny.llama(), "around"))
    model.save_pretrained(tmp_path)
    assert {"model.safetensors", "config.json"} <= files(tmp_path)


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    peftcore.apply(tiny.llama(), "around").save_pretrained(tmp_path, is_main_process=False)
    assert not files(tmp_path)


def test_a_trainer_that_is_imported_after_apply_knows_adapters() -> None:
    script = (
        "import sys, peftcore\nfrom support import tiny\n"
        "with tiny.installed(tiny.method('around')):\n"
        "    peftcore.apply(tiny.llama(), 'around')\n"
        "assert 'transformers.trainer' not in sys.modules\n"
        "from transformers import Trainer\n"
        "assert Trainer.__init__.__wrapped__ and 'peftcore.training.integrations.trainer' in sys.modules\n"
    )
    path = str(Path(__file__).parents[2])
    done = fresh_process.run(f"import sys; sys.path.insert(0, {path!r})\n{script}")
    assert done.returncode == 0, done.stderr
