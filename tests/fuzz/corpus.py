"""What all corpora share: how many cases of them run, a limit of time, a report of all that went wrong, processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import fresh_process
from support.whole_run import WHOLE

SECONDS = 10  # that a case may take
SEED = int(os.environ.get("PEFTCORE_FUZZ_SEED", "0"))
_HERE = f"import os; os.chdir({str(Path(__file__).parents[1])!r}); "
_MODULE = "import runpy, sys; runpy.run_module('fuzz.' + sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def cases(name: str, count: int) -> Iterator[tuple[int, random.Random]]:
    """(number, its own random numbers) of all cases in `make test-all`, of each tenth in `make test`."""
    for number in range(0, count, 1 if WHOLE else 10):
        yield number, random.Random(f"{name} {SEED} {number}")


class TooLong(BaseException):
    pass


@contextmanager
def limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TooLong in the block when the time is over. A hang in C that looks for no signal is not ended by it."""

    def over(*_: object) -> None:
        raise TooLong(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def program(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m fuzz.name arguments` in a process of its own, which may crash."""
    return run(_MODULE, name, *arguments)


def run(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run `code` in the folder of the tests, in a process of its own."""
    return fresh_process.run(_HERE + code, *map(str, arguments), OMP_NUM_THREADS="1")


def report(name: str, count: int, case: Callable[[int, random.Random], str]) -> None:
    """Run the cases of a corpus; `case` returns a word for its outcome. Fail with all that raised something else."""
    outcomes: dict[str, int] = {}
    wrong = []
    for number, rng in cases(name, count):
        try:
            with limit():
                outcome = case(number, rng)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        except (Exception, TooLong) as error:
            wrong.append(f"case {number}: {type(error).__name__}: {str(error)[:400]}")
    print(name, outcomes)
    assert not wrong, f"{len(wrong)} of {sum(outcomes.values()) + len(wrong)} cases of {name}:\n" + "\n".join(
        wrong[:40]
    )
