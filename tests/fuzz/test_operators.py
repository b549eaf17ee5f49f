"""2,000 hostile calls a SIMD level (each tenth in `make test`): what the reference gives, or a refusal."""

import pytest
from fuzz import corpus
from support.whole_run import WHOLE, nightly_but

from peftcore import ops

COUNT = 2000
LEVELS = list(ops.extension.cpu_levels()) if ops.extension is not None else []


@pytest.mark.parametrize(
    "level", nightly_but(LEVELS, [LEVELS[0], LEVELS[-1]] if LEVELS else [])
)  # all in test_levels_agree
def test_every_call_is_right_or_refused(level):
    """In a process of its own: a crash is that process's, and its last line says at which call."""
    first = corpus.SEED * COUNT
    numbers = first, first + COUNT, 1 if WHOLE else 10
    done = corpus.program("operators", level, *numbers)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert done.returncode == 0 and lines[-1] == "done", f"ended {lines[-1:]}: {done.returncode} {done.stderr[-2000:]}"
    assert not wrong, "\n".join(wrong)


def test_memory_ends_where_it_cannot_be_read():
    """The corpus's own instrument: a byte behind a guarded tensor is a segmentation fault."""
    code = "import ctypes, torch; from fuzz.memory import guarded; t = guarded(5, torch.float32); "
    code += "ctypes.string_at(t.data_ptr(), {})"
    ends = [corpus.run(code.format(size)).returncode for size in (20, 21)]
    assert ends == [0, -11]
