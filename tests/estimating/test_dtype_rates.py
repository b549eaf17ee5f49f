"""Fast dtypes by rates made by hand, the time that measuring takes, and the file of the machine."""

import json
from pathlib import Path

import pytest
import torch

from peftcore.estimating import dtype_rates
from peftcore.estimating.dtype_rates import DtypeRate, DtypeRates

AVX2 = DtypeRates(DtypeRate(50e9, 60e9), DtypeRate(8e9, 0.7e9), DtypeRate(15e9, 1.8e9))
ZEN4 = DtypeRates(DtypeRate(70e9, 95e9), DtypeRate(116e9, 190e9), DtypeRate(16e9, 1.8e9))


def test_a_dtype_is_fast_at_half_of_the_rate_of_fp32() -> None:
    assert [AVX2.is_fast(name) for name in dtype_rates.DTYPES] == [True, False, False]
    assert [ZEN4.is_fast(name) for name in dtype_rates.DTYPES] == [True, True, False]
    half = DtypeRates(DtypeRate(2.0, 2.0), DtypeRate(1.0, 1.0), DtypeRate(1.0, 0.99))
    assert half.is_fast("bf16") and not half.is_fast("fp16")


def test_both_products_count_by_their_time() -> None:
    assert AVX2.bf16.both == pytest.approx(2 / (1 / 8e9 + 1 / 0.7e9))
    assert AVX2.share("bf16") == pytest.approx(1.287 / 54.545, rel=1e-3)
    assert AVX2.sentence("bf16") == "at 0.024 of fp32's rate on this processor (1.3 of 55 GFLOP/s per core)"
    assert dtype_rates.gigaflops(2345e9) == "2,345"


class Clock:
    """Seconds that pass with every look: `steps` after one another, then the last of them."""

    def __init__(self, *steps: float) -> None:
        self.now, self.looks, self.steps = 0.0, 0, steps

    def __call__(self) -> float:
        self.now += self.steps[min(self.looks, len(self.steps) - 1)]
        self.looks += 1
        return self.now


def test_measures_each_product_of_each_dtype_in_one_thread() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = dtype_rates.measure(Clock(0.5, *range(1, 13), 0.01))
    # Warming up took 1, 3, 5, ... seconds, too long to be done again.
    wanted = [2 * 256**3 / seconds for seconds in (1, 3, 5, 7, 9, 11)]
    assert [each for rate in found for each in rate] == pytest.approx(wanted)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_time_is_bounded_where_a_product_is_slow() -> None:
    slow = Clock(0.3)
    assert dtype_rates.measure(slow).bf16.forward == pytest.approx(2 * 256**3 / 0.3)
    assert slow.looks <= 16  # six products once
    quick = Clock(0.001)
    dtype_rates.measure(quick)
    assert quick.now < 0.62


def test_the_file_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    dtype_rates.here.cache_clear()
    first = dtype_rates.here()
    file = tmp_path / "peftcore" / "dtypes.json"
    ((machine, kept),) = json.loads(file.read_text()).items()
    assert "ATEN_CPU_CAPABILITY=avx2" in machine, "other instructions are another machine"
    assert dtype_rates.read(kept) == first and dtype_rates.here() is first
    file.write_text(json.dumps({machine: AVX2._asdict(), "other": kept}))
    dtype_rates.here.cache_clear()
    assert dtype_rates.here() == AVX2
    again = dtype_rates.measured_again()
    assert json.loads(file.read_text()) == {machine: json.loads(json.dumps(again._asdict())), "other": kept}
    dtype_rates.here.cache_clear()


@pytest.mark.parametrize("kept", [{}, {"fp32": [1, 2], "bf16": [1, 2], "fp16": [1, 0]}, {"fp32": 1.0}, []])
def test_other_files_are_refused(kept: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        dtype_rates.read(kept)
