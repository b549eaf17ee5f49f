"""Times of work under the values of PEFTCORE_CUDA_TUNING, from which the table of csrc/common/cuda_tuning.cu is set.

    python -m card_stages.tuning --results FILE --until SECONDS WORK ...

The rows have the value of PEFTCORE_CUDA_TUNING as their label. Up to 64 rows of x are for the panel, and more for
cuBLAS: rows of 96 and 128 show how cuBLAS continues.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from card_stages import timings
from card_stages.jobs import measure_jobs, stage_parser
from card_stages.results import Results

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # of W, [out, in]


def few_rows() -> Iterator[timings.Row]:
    return with_label("peftcore QLoRA", layers((1, 4, 8)))


def panel() -> Iterator[timings.Row]:
    return with_label("peftcore QLoRA", layers((16, 32, 48, 64, 96, 128)))


def low_rank() -> Iterator[timings.Row]:
    for rows in (64, 512, timings.MANY):
        yield from with_label("peftcore LoRA, dense", timings.layer(rows))


def dequantize() -> Iterator[timings.Row]:
    return with_label("peftcore dequantize", timings.four_bits())


def quantize() -> Iterator[timings.Row]:
    return with_label("peftcore quantize", timings.four_bits())


def step() -> Iterator[timings.Row]:
    for kind in ("AdamW", "AdamW8bit"):
        yield from with_label(f"peftcore {kind}", timings.steps())


def layers(rows: tuple[int, ...]) -> Iterator[timings.Row]:
    for shape in SHAPES:
        for count in rows:
            yield from timings.layer(count, shape)


def with_label(label: str, rows: Iterator[timings.Row]) -> Iterator[timings.Row]:
    return (row._replace(group=f"{label}, {row.group}") for row in rows if row.label == label)


WORK = {
    "few rows": few_rows,
    "panel": panel,
    "low rank": low_rank,
    "dequantize": dequantize,
    "quantize": quantize,
    "step": step,
}


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("work", nargs="+", choices=WORK)
    options = parser.parse_args()
    results, setting = Results(options.results), os.environ.get("PEFTCORE_CUDA_TUNING") or "as built"
    bandwidth, product = timings.rates_of_card("tuning", results)
    jobs = (timings.job_of(row, setting, bandwidth, product) for work in options.work for row in WORK[work]())
    measure_jobs("tuning", jobs, results, options.until)


if __name__ == "__main__":
    main()
