"""Memory beyond tensors: what operators keep."""

from peftcore.estimating.costs import Cost, kept
from peftcore.estimating.overhead import NONE, OUTER, PLAIN, Overhead, read

MADE = Overhead(500, 20, {"bfloat16": 40}, {f"bfloat16 {OUTER}": 4.0}, 0.25)


def test_code_is_kept_for_each_shape() -> None:
    one, other = (Cost(product=(8, 8, 8, layout), dtype="bfloat16") for layout in (PLAIN, OUTER))
    assert kept([one, one, other, Cost(kept=1000)], MADE) == 1080
    assert kept([Cost(product=(8, 8, 8, PLAIN), dtype="float32")], MADE) == 0
    assert MADE.for_shapes({"bfloat16": 3000}) == 1024 * 40
    assert kept([one, other], NONE) == 0


def test_reads_what_json_keeps() -> None:
    assert read(MADE._asdict()) == MADE
