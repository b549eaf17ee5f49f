"""`make bench` runs every benchmark, also after one that fails, and lists the rows that are slower than a peer."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run_all

    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setattr(run_all, "KEPT", tmp_path / "kept")
    return run_all


def test_all_scripts_run_and_the_exit_code_says_whether_one_failed(run_all, monkeypatch, tmp_path, capfd) -> None:
    # Its first run is slower in two rows, its second in one of them.
    runs = [[("a step", 0.5), ("noise", 1.06), ("slow", 1.1)], [("a step", 0.5), ("noise", 1.0), ("slow", 1.2)]]
    for number, ratios in enumerate(runs):
        rows = [{"what": what, "ratio": ratio, "peer": "peft"} for what, ratio in ratios]
        (tmp_path / f"{number}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    good = "import os, pathlib\nhere = pathlib.Path(__file__).parent\nnext_run = min(here.glob('*.jsonl'))\n"
    good += "pathlib.Path(os.environ['PEFTCORE_RATIOS']).write_text(next_run.read_text())\n"
    good += "next_run.unlink()\nprint('good')"
    (tmp_path / "good.py").write_text(f"import time\ntime.sleep(0.3)\n{good}")
    monkeypatch.setattr(run_all, "SILENCE", 0.2)
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(f'what is wrong: {sys.argv[1]}')")
    monkeypatch.setattr(run_all, "SECONDS", {"good": 60, "bad": 0})
    monkeypatch.setattr(sys, "argv", ["run_all.py", str(tmp_path / "good.py"), f"{tmp_path / 'bad.py'} --option"])
    with pytest.raises(SystemExit) as ended:
        run_all.main()
    assert ended.value.code == 1
    out = capfd.readouterr().out
    assert out.startswith("2 benchmarks, about 1 minutes on two cores")
    assert "== 1 of 2, about 0 s: " in out and "what is wrong: --option\n" in out and "\ngood\n" in out
    assert "   (running for 0 s)" in out.partition("\ngood\n")[0]
    assert "(running" not in (tmp_path / "kept/good.txt").read_text()
    assert "== again: " in out and out.count("\ngood\n") == 2 and out.count("what is wrong") == 1
    assert "1 of 3 rows are more than 3% above the library next to them\n    1.15 of peft" in out
    assert "good: slow (1.10 and 1.20)\n" in out
    assert re.search(r"bad\.py --option +\d+ +\d+ +1  FAILED\n", out)
    assert re.search(r"good\.py +\d+ +\d+ +3 +1\.03 +0\n", out)
    assert "failed: bad; kept has what they printed" in out
    assert (tmp_path / "kept/bad.txt").read_text().endswith("what is wrong: --option\n")
    assert (tmp_path / "kept/ratios.png").exists()
