"""The command: options, the order of stages within the time, and the exit code."""

from __future__ import annotations

import argparse
import json
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from card_stages import machine, report, stages
from card_stages.results import FAILED, PROVING, TIME_WAS_UP, Results

# The stages in their order, and the seconds that each leaves to the stages after it.
STAGES = {"build": 0, "correctness": 280, "tools": 200, "timings": 120, "tuning": 70, "training": 35, "decoding": 5}
INCOMPLETE = 3


def main(description: str | None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results, logs and the report")
    parser.add_argument("--seconds", type=float, default=560, help="time limit of the whole run (default: 560)")
    parser.add_argument("--resume", type=Path, help="continue from the results of an interrupted run")
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"stages to run: {', '.join(STAGES)}"
    )
    parser.add_argument("--emulator", action="store_true", help="run the kernels on the CPU, without timings")
    parser.add_argument("--list", action="store_true", help="print stages and cases, and run nothing")
    parser.add_argument("--wheels", type=Path, default=machine.ROOT / "wheels", help="folder of wheels to import")
    parser.add_argument("--patience", type=float, default=20, help="seconds after which a job counts as hung (20)")
    parser.add_argument("--most", type=int, help="number of cases of each function (default: all)")
    parser.add_argument("--pack", type=Path, help="archive (.tgz) of the folder, written after each stage")
    parser.add_argument("--commit", help="the checkout's commit, for a report from an archive without .git")
    parser.add_argument("--table", default="card.table", help=argparse.SUPPRESS)  # tests run other cases
    options = parser.parse_args()
    stage_names = options.only or [name for name in STAGES if not options.emulator or name in PROVING]
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.json")
    if options.list:
        return print_cases(stage_names, stage_run(options, results, time.time(), print))
    if options.resume is None and results.path.exists():
        parser.error(f"{results.path} exists. Continue with --resume {results.path}, or choose another --out")
    if options.resume is not None and options.resume.resolve() != results.path.resolve():
        results.path.write_bytes(options.resume.read_bytes())
    results.path.touch()
    return run(options, results, stage_names)


def run(options: argparse.Namespace, results: Results, stage_names: list[str]) -> int:
    began = time.time()

    def log(text: str) -> None:
        print(f"[{time.time() - began:5.0f} s] {text}", flush=True)

    facts = machine.facts(options.wheels) | ({"commit": options.commit} if options.commit else {})
    (options.out / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
    for stage in stage_names:
        left = options.seconds - (time.time() - began)
        until = time.time() + max(left - STAGES[stage] if options.only is None else left, min(left, 30))
        log(f"{stage}, until {until - began:.0f} s")
        run_one(stage, stage_run(options, results, until, log))
        counts = Counter(row["status"] for row in results if row["stage"] == stage)
        text = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        log(f"{stage}: {text or 'nothing ran'}")
        code = write_report(options.out, results, stage_names)
        pack(options.out, options.pack)
        if stage == "build" and counts[FAILED]:
            log(next(row["detail"] for row in results if row["stage"] == stage and row["status"] == FAILED))
            break
    log(f"exit code {code}; the report is {options.out / 'report.md'}")
    return code


def run_one(stage: str, options: stages.Run) -> None:
    if stage == "build":
        stages.build(options)
    elif stage == "tools":
        stages.tools(options)
    elif stage == "tuning":
        stages.tuning(options)
    elif stage == "correctness":
        stages.run_stage(options, stage, stages.case_options(options))
    else:
        stages.run_stage(options, stage)


def write_report(out: Path, results: Results, stage_names: list[str]) -> int:
    """Write the report of the rows so far, and return the exit code."""
    expected = case_names(out) if "correctness" in stage_names else []
    code = exit_code(results, expected)
    report.write(out, results, expected, code)
    return code


def pack(out: Path, archive: Path | None) -> None:
    """Write all files of a folder to an archive, which replaces the previous one."""
    if archive is None:
        return
    files = [path for path in sorted(out.iterdir()) if path.is_file() and path.suffix != ".tgz"]
    new = archive.with_name(f"{archive.name}.new")
    with tarfile.open(new, "w:gz") as file:
        for path in files:
            file.add(path, arcname=f"{out.name}/{path.name}")
    new.replace(archive)


def stage_run(options: argparse.Namespace, results: Results, until: float, log: Callable[[str], None]) -> stages.Run:
    return stages.Run(
        out=options.out,
        results=results,
        until=until,
        emulator=options.emulator,
        wheels=options.wheels,
        patience=options.patience,
        most=options.most,
        table=options.table,
        log=log,
    )


def case_names(out: Path) -> list[str]:
    """Return the names of all cases, or none if the process that lists them did not start."""
    path = out / "cases.json"
    return json.loads(path.read_text()) if path.exists() else []


def exit_code(results: Results, expected: list[str]) -> int:
    """Return 1 if a check failed, 3 if time ran out before all checks ran, else 0."""
    rows = [row for row in results if row["stage"] in PROVING]
    if any(row["status"] == FAILED for row in rows):
        return 1
    names = {row["name"] for row in rows if row["stage"] == "correctness"}
    missing = set(expected) - names or any(row.get("detail") == TIME_WAS_UP for row in rows)
    return INCOMPLETE if missing else 0


def print_cases(stage_names: list[str], options: stages.Run) -> int:
    print("stages: " + ", ".join(stage_names))
    arguments = "--results", str(options.results.path), "--until", "0", *stages.case_options(options), "--list"
    code = options.python("-m", "card_stages.correctness", *arguments, log="correctness.log").wait()
    print("\n".join(case_names(options.out)))
    return code
