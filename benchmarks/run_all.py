"""Run benchmarks one after the other, the shortest first; `make bench` calls this with all of them.

    python benchmarks/run_all.py benchmarks/lora.py "benchmarks/decode.py --shapes smollm2-135m" ...

Each argument is a script and its options. What a script prints is shown and also kept in build/bench/NAME.txt; where it
prints nothing for half a minute, a line says how long it has run. The table at the end has the seconds that each took,
the seconds of processors, and the exit code. A script that fails does not keep the others from running; the exit code
is 1 if one failed. Before the table is a summary of all rows that have a library next to them (`measure.note_ratio`):
how many are slower or larger by more than 3 %, and which. A script with such rows runs a second time at the end, and
its rows are the means of both runs. build/bench/ratios.png shows them all.
"""

import json
import os
import queue
import resource
import shlex
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "bench"
SLOWER = 1.03
SILENCE = 30  # seconds
# Seconds with the options of the Makefile, measured on two cores of a Zen 5 that did nothing else; methods_layers and
# methods are estimates from half of their rows.
SECONDS = {
    "experts_cuda": 2,
    "lora_cuda": 2,
    "qlora_large": 10,
    "linear_cross_entropy": 14,
    "layer": 26,
    "quant4": 30,
    "apply": 36,
    "optim": 38,
    "experts": 39,
    "linear_4bit": 39,
    "distributed": 47,
    "estimate": 49,
    "suggest": 69,
    "decode": 75,
    "engine": 89,
    "many_adapters": 90,
    "qlora": 93,
    "dora": 99,
    "processors": 115,
    "lora": 117,
    "serve": 146,
    "exactness": 246,
    "step": 248,
    "methods_layers": 280,
    "methods": 300,
    "quality_4bit": 348,
}


def name_of(command):
    return Path(command[0]).stem


def seconds_of(command):
    """Return the seconds that a run is expected to take; scripts without a measurement come last."""
    return SECONDS.get(name_of(command), float("inf"))


def lines_of(output):
    """Yield each line, and None after SILENCE seconds without one."""
    waiting = queue.Queue()

    def read():
        for line in output:
            waiting.put(line)
        waiting.put("")  # no line is empty

    threading.Thread(target=read, daemon=True).start()
    line = None
    while line != "":
        try:
            line = waiting.get(timeout=SILENCE)
        except queue.Empty:
            line = None
        if line != "":
            yield line


def run(command):
    """Run a script, show and keep its output; return (seconds, processor seconds, exit code, ratios)."""
    ratios = KEPT / f"{name_of(command)}.jsonl"
    ratios.write_text("")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PEFTCORE_RATIOS": str(ratios)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with (KEPT / f"{name_of(command)}.txt").open("w") as kept:
        kept.write(f"{shlex.join(command)}\n")
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen([sys.executable, *command], env=environment, **pipe) as process:
            for line in lines_of(process.stdout):
                if line is None:
                    print(f"   (running for {time.perf_counter() - start:.0f} s)", flush=True)
                else:
                    print(line, end="", flush=True)
                    kept.write(line)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used, process.returncode, [json.loads(line) for line in ratios.read_text().splitlines()]


def with_second_run(command, first):
    """Return the result of `run`; if rows were slower, run again: ratios are then the means of both."""
    if all(row["ratio"] <= SLOWER for row in first[3]):
        return first
    print(f"\n== again: {shlex.join(command)}", flush=True)
    seconds, used, code, ratios = run(command)
    second = {(row["what"], row["peer"]): row["ratio"] for row in ratios}
    means = []
    for row in first[3]:
        both = [row["ratio"], second.get((row["what"], row["peer"]), row["ratio"])]
        means.append({**row, "ratio": statistics.geometric_mean(both), "runs": both})
    return first[0] + seconds, first[1] + used, max(first[2], code), means


def show(rows):
    """Print what is slower than a peer, and what each script took; return whether one failed."""
    above = [(command, row) for command, (*_, ratios) in rows for row in ratios if row["ratio"] > SLOWER]
    compared = sum(len(ratios) for _, (*_, ratios) in rows)
    if compared:
        print(f"\n{len(above)} of {compared} rows are more than {SLOWER - 1:.0%} above the library next to them")
        for command, row in sorted(above, key=lambda each: -each[1]["ratio"]):
            runs = " and ".join(f"{ratio:.2f}" for ratio in row.get("runs", [row["ratio"]]))
            print(f"{row['ratio']:8.2f} of {row['peer']:28}{name_of(command)}: {row['what']} ({runs})")
    width = max(len(shlex.join(command)) for command, _ in rows)
    print(f"\n{'':{width}}{'seconds':>9}{'processor':>11}{'rows':>6}{'median ratio':>14}{'exit code':>11}")
    for command, (seconds, used, code, ratios) in rows:
        median = f"{statistics.median(row['ratio'] for row in ratios):.2f}" if ratios else ""
        print(
            f"{shlex.join(command):{width}}{seconds:9.0f}{used:11.0f}{len(ratios) or '':6}{median:>14}{code:11}", end=""
        )
        print("  FAILED" if code else "")
    failed = [name_of(command) for command, (_, _, code, _) in rows if code]
    whole = sum(seconds for _, (seconds, *_) in rows)
    print(f"{len(rows)} benchmarks in {whole / 60:.1f} minutes; failed: {', '.join(failed) or 'none'}; ", end="")
    print(f"{KEPT.relative_to(ROOT)} has what they printed")
    return bool(failed)


def stacked(ratios):
    """Yield (ratio, height) from the least on; points that would hide one another, on a line, are above one another."""
    before, level = 0.0, 0
    for ratio in sorted(max(ratio, 1 / 8) for ratio in ratios):
        level = level + 1 if ratio < before * 1.012 else 0
        before = before if level else ratio
        yield ratio, 0.11 * min(level, 6)


def draw(rows):
    """Draw all ratios, a line of points for each script; less than an eighth is drawn as an eighth."""
    import matplotlib.pyplot as plt

    shown = [(name_of(command), [row["ratio"] for row in ratios]) for command, (*_, ratios) in rows if ratios]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.42 * len(shown)), layout="constrained")
    for place, (_, ratios) in enumerate(reversed(shown)):
        axes.axhline(place, color="#e4e7ec", linewidth=0.8, zorder=0)
        for ratio, height in stacked(ratios):
            color = "#b3261e" if ratio > SLOWER else "#2457a6"
            axes.scatter(ratio, place + height, c=color, s=24, linewidths=0)
    axes.axvline(1, color="#8791a3", linewidth=1)
    axes.set_xscale("log", base=2)
    least, most = axes.get_xlim()
    axes.set_xlim(least, max(most, 1.3))
    axes.set_ylim(-0.5, len(shown) - 0.2)
    ticks = [tick for tick in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 1.25, 1.5, 2, 4, 8) if least <= tick <= max(most, 1.3)]
    axes.set_xticks(ticks, [f"{tick:g}x" if tick > 1 / 8 else "up to 0.125x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(shown)), [f"{name} ({len(ratios)})" for name, ratios in reversed(shown)])
    compared, above = sum(len(ratios) for _, ratios in shown), sum(r > SLOWER for _, ratios in shown for r in ratios)
    axes.set_title(f"{compared} rows of make bench; red: {above} more than {SLOWER - 1:.0%} above", fontsize=11)
    axes.set_xlabel("time or memory over the other library's; left of 1 is better")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(KEPT / "ratios.png", dpi=130)
    plt.close(figure)
    print(f"{KEPT.relative_to(ROOT)}/ratios.png shows all ratios")


def main():
    commands = sorted((shlex.split(argument) for argument in sys.argv[1:]), key=seconds_of)
    if not commands or any(word in ("-h", "--help") for word in sys.argv[1:]):
        sys.exit(__doc__)
    KEPT.mkdir(parents=True, exist_ok=True)
    expected = [SECONDS[name_of(command)] for command in commands if name_of(command) in SECONDS]
    print(f"{len(commands)} benchmarks, about {sum(expected) / 60:.0f} minutes on two cores that do nothing else")
    rows, interrupted = [], False
    try:
        for number, command in enumerate(commands, 1):
            known = f", about {SECONDS[name_of(command)]} s" if name_of(command) in SECONDS else ""
            print(f"\n== {number} of {len(commands)}{known}: {shlex.join(command)}", flush=True)
            rows.append((command, run(command)))
            seconds, used, code, _ = rows[-1][1]
            print(f"-- {seconds:.0f} s, {used:.0f} s of processors, exit code {code}", flush=True)
        for place, (command, result) in enumerate(rows):
            rows[place] = command, with_second_run(command, result)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted")
    if not rows:
        sys.exit(130)
    failed = show(rows)
    draw(rows)
    sys.exit(130 if interrupted else failed)


if __name__ == "__main__":
    main()
