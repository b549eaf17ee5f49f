"""Memory of a process beyond the tensors of its step: measured once on this machine, and kept in a file.

    peak of a process   libraries + kept by operators + tensors + what the allocator does not return

- Libraries: Python, PyTorch and transformers, with what they allocate in their first products.
- Operators: oneDNN keeps code for each shape of a product; a product in 16 bits may go through a copy in fp32.
- The allocator: a C library returns a large tensor to the system when it is freed. It serves small ones from a heap
  that does not shrink and whose holes are too small for the next tensor. `calibration` measures how far the heap
  outgrows the tensors in it, with the allocator of this process. glibc calls 32 MiB and more large
  (mallopt(3), M_MMAP_THRESHOLD).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

PLAIN, TRANSPOSED, OUTER = "xw", "xwt", "xtw"  # layouts of products: x w, x wᵀ and xᵀ w
_MOST_SHAPES = 1024  # shapes that oneDNN keeps code for (ONEDNN_PRIMITIVE_CACHE_CAPACITY)


class Overhead(NamedTuple):
    """Bytes that a process takes beyond its tensors.

    Args:
        libraries: Resident bytes of a process that has imported transformers' Trainer and run a tiny step.
        first_step: Bytes of `libraries` that appeared in the tiny step.
        code: Bytes kept for each shape of a product, by dtype.
        scratch: Bytes for each value of a product's result while it is computed, by `"dtype layout"`.
        allowance: Share by which the heap outgrows the tensors that come and go in it.
    """

    libraries: int
    first_step: int
    code: Mapping[str, int]
    scratch: Mapping[str, float]
    allowance: float

    def for_shapes(self, shapes: Mapping[str, int]) -> int:
        """Return the bytes of code kept for so many shapes by dtype."""
        return sum(self.code.get(dtype, 0) * min(_MOST_SHAPES, count) for dtype, count in shapes.items())


# The largest values seen with glibc (Cascade Lake and Zen 4), for systems on which nothing can be measured.
LARGEST_SEEN = Overhead(
    600_000_000,
    60_000_000,
    {"bfloat16": 600_000, "float16": 40_000},
    {f"{dtype} {layout}": 4.0 for dtype in ("bfloat16", "float16") for layout in (PLAIN, TRANSPOSED, OUTER)},
    0.4,
)
NONE = Overhead(0, 0, {}, {}, 0.0)  # on a card


def read(found: Mapping[str, Any]) -> Overhead:
    """Return the overhead that an entry of the file describes.

    Raises:
        KeyError, TypeError, ValueError: The entry has another format.
    """
    made = Overhead(**found)
    return Overhead(
        int(made.libraries),
        int(made.first_step),
        {name: int(each) for name, each in made.code.items()},
        {name: float(each) for name, each in made.scratch.items()},
        float(made.allowance),
    )
