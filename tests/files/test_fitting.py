"""What a file's config would place is made on the meta device, without values; what is not there has its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.counted_lines import growth
from torch import nn

import peftcore
from peftcore.files.fitting import Unfilled


def test_only_what_is_on_the_meta_device_stays_without_values() -> None:
    with torch.device("meta"), Unfilled():
        meta = [torch.zeros(3), torch.ones(2, 3, requires_grad=True), nn.init.normal_(tensor=torch.empty(3))]
        zeros, ones = torch.zeros(3, device="cpu"), torch.ones((2, 3), device="cpu", dtype=torch.int32)
        drawn = nn.init.uniform_(torch.full((9,), 7.0, device="cpu"))
        with torch.device("cpu"):
            inside = torch.ones(5)
    assert all(tensor.is_meta for tensor in meta) and meta[1].requires_grad
    assert zeros.tolist() == [0, 0, 0] and ones.tolist() == 2 * [3 * [1]] and inside.sum() == 5
    assert drawn.max() < 1


def test_work_on_tensors_without_a_place_grows_with_their_number_alone(tmp_path: Path) -> None:
    adapted = peftcore.apply(tiny.llama(), "lora", target_modules=["q_proj"], r=2)

    def loading(size: int) -> Callable[[], None]:
        folder, size = tmp_path / str(size), max(size, 1)
        peftcore.save(adapted, folder)
        tiny.without_hash(folder)
        file = folder / "adapter_model.safetensors"
        more = {f"base_model.model.layers.{i}.q_proj.lora_A.weight": torch.ones(1) for i in range(size)}
        save_file({**load_file(file), **more}, file, {"format": "pt"})
        model = tiny.llama()

        def call() -> None:
            message = rf"{size} tensors are unexpected, such as 'base_model\.model\.layers"
            with pytest.raises(peftcore.CheckpointError, match=message):
                peftcore.load(model, folder)

        return call

    assert growth(loading, 500) < 2.5


def test_a_config_far_larger_than_its_file_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = peftcore.save(peftcore.apply(tiny.llama(), "lora", r=2), tmp_path / "a")
    tiny.without_hash(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 10**7}))
    with pytest.raises(
        peftcore.CheckpointError, match=r"describes an adapter with [0-9,]{11,} values, but .* has [0-9,]+"
    ):
        peftcore.load(tiny.llama(), folder)
