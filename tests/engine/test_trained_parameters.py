"""What an adapter has in place of the base's: copies, merging and files of it."""

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.engine.trained_parameters import TrainedParameters, base_tensors, updated_buffers
from peftcore.files.loading import restore

pytestmark = pytest.mark.usefixtures("toys")


def trained() -> nn.Module:
    """A net with a BatchNorm whose statistics an adapter has moved."""
    model = peftcore.apply(tiny.batchnorm_net(), "around", target_modules=("head",), value=1.0)
    model.train()(tiny.IMAGES)
    return model.eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny.IMAGES)


def test_buffers_that_training_may_move() -> None:
    names = [name for name, _ in updated_buffers(tiny.batchnorm_net())]
    assert names == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert updated_buffers(tiny.llama()) == []
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    packed.register_buffer("scales", torch.ones(4))
    assert updated_buffers(packed) == []
    assert updated_buffers(peftcore.quantize(tiny.llama())) == []


def test_copies_carry_what_was_moved() -> None:
    model = trained()
    wanted, again = output(model), copy.deepcopy(model)
    assert torch.equal(output(again), wanted)
    with peftcore.disabled(again):
        assert torch.equal(output(again), output(tiny.batchnorm_net()))


def test_merging_takes_what_was_moved_along() -> None:
    model = trained()
    wanted = output(model)
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(output(model), wanted)
    peftcore.unmerge(model)
    assert torch.equal(output(model), wanted)
    peftcore.merge(model)
    torch.testing.assert_close(output(model), wanted)
    assert "peftcore" not in "".join(model.state_dict())


def test_statistics_are_saved_where_they_moved(tmp_path: Path) -> None:
    model = trained()
    peftcore.save(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    moved = {f"base_model.model.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert tensors.keys() == {"base_model.model.head.gain", *moved}
    assert torch.equal(output(peftcore.load(tiny.batchnorm_net(), tmp_path)), output(model))
    still = peftcore.save(peftcore.apply(tiny.batchnorm_net(), "around", target_modules=("head",)), tmp_path / "still")
    assert list(safetensors.torch.load_file(still / "adapter_model.safetensors")) == ["base_model.model.head.gain"]
    restore(model, still)  # the file says: as in the base
    assert torch.equal(model.norm.running_mean, tiny.batchnorm_net().norm.running_mean)


def test_values_and_originals() -> None:
    model = peftcore.apply(tiny.batchnorm_net(), "train", names=("head.weight",))
    base = tiny.batchnorm_net()
    with torch.no_grad():
        model.head.weight.zero_()
    model.train()(tiny.IMAGES)
    own = TrainedParameters.of(model, "default")
    assert [(name, p.abs().max().item()) for name, p in own.values(model)] == [("head.weight", 0)]
    assert dict(adapter_parameters(model, "default")).keys() == {"head.weight"}
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in base_tensors(model).items())
    assert base_tensors(model).keys() == base.state_dict().keys()
    assert own.differs_from_base(model)
