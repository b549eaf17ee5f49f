"""Devices that PyTorch does not know or cannot use are errors."""

import pytest
import torch
from peftcore_cli.bases.device_choice import torch_device

from peftcore import PeftcoreError


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("nonsense", "unknown device 'nonsense'. Use auto, cpu, cuda, or cuda:1"),
        ("meta", "device 'meta' cannot compute"),
        ("xpu", "device 'xpu' is not available: .* Use auto, cpu, or cuda"),
        ("hpu", "device 'hpu' is not available: .* Use auto, cpu, or cuda"),
    ],
)
def test_devices_without_a_computation(device: str, message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        torch_device(device)


def test_the_number_of_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [torch_device(device).index for device in ("auto", "cuda:1", "cpu")] == [None, 1, None]
    with pytest.raises(PeftcoreError, match=r"'cuda:2' is not available\. Use one of cuda:0 to cuda:1"):
        torch_device("cuda:2")
