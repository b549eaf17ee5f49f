"""Write under the code of the documentation's pages, and into the notebooks, what it prints.

    python benchmarks/demo/pages.py [PAGE ...]      (make pages; without arguments: every page that shows output)

A block of code whose output is shown is followed by a comment and a block that this script fills in:

    ```sh
    peftcore train ... --output run
    ```

    <!-- output: first=3 last=4 -->
    ```text
    ```

`first` and `last` keep that many lines of the output, with `...` between them; `typed="...|..."` are the lines typed
at the prompt; `picture=NAME` draws the terminal to docs/assets/NAME.svg instead. A page
of HTML that a command wrote is photographed by Chromium: `screenshot=FILE size=WIDTHxHEIGHT name=NAME` stands above the
picture docs/assets/NAME.png. All blocks of a page run, in their
order, in one folder with `examples/` and SmolLM2-135M-Instruct. The model comes from the demo's package and lies under
its name on the hub, so that no hub is needed. Blocks that are marked `not run here` are left out.
"""

import ast
import base64
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

from run import ROOT, WRITER, fetch

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = ROOT / ".demo/pages"
PICTURES = ROOT / "docs/assets"
COLUMNS = 90
SCREENSHOT = re.compile(r"\n<!-- output: (screenshot=[^\n]*) -->\n")
BLOCK = re.compile(
    r"(?P<skipped><!-- not run here: [^\n]* -->\n)?```(?P<language>sh|python|toml)\n(?P<code>.*?)```\n"
    r"(?P<shown>\n<!-- output(?:: (?P<options>[^\n]*))? -->\n(?P<old>```text\n.*?```|!\[[^\n]*\))\n)?",
    re.DOTALL,
)


def main(pages: list[Path]) -> None:
    prepare()
    for page in pages:
        print(f"\n{page.relative_to(ROOT)}", flush=True)
        folder = FOLDER / page.stem
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copytree(ROOT / "examples", folder / "examples")
        # Hard links: commands print a model's real path, where a link's would lead out of the folder.
        shutil.copytree(FOLDER / MODEL, folder / MODEL, copy_function=os.link)
        text = page.read_text(encoding="utf-8")
        filled = notebook(text, folder) if page.suffix == ".ipynb" else with_outputs(text, folder)
        page.write_text(filled, encoding="utf-8")


def prepare() -> None:
    """Write the model as a folder of transformers, under its name on the hub."""
    if (FOLDER / MODEL / "model.safetensors").exists():
        return
    demo = ROOT / ".demo"
    demo.mkdir(exist_ok=True)
    fetch(demo)
    from peftcore_cli.bases import models

    models.load_tokenizer(str(demo / WRITER)).save_pretrained(FOLDER / MODEL)
    models.load_model(str(demo / WRITER), "causal-lm", dtype="bf16").save_pretrained(FOLDER / MODEL)


def with_outputs(text: str, folder: Path) -> str:
    """Run the blocks of a page in a folder; return the page with their outputs."""
    variables: dict[str, object] = {}
    parts, end = [], 0
    for block in BLOCK.finditer(text):
        if block["skipped"]:
            continue
        options = dict(option.split("=", 1) for option in shlex.split(block["options"] or ""))
        printed = run_block(block["language"], block["code"], folder, variables, options)
        if block["shown"]:
            parts += [text[end : block.start("old")], shown(printed, options)]
            end = block.end("old")
    for options in SCREENSHOT.findall(text):
        screenshot(folder, **dict(option.split("=", 1) for option in options.split()))
    return "".join(parts) + text[end:]


def screenshot(folder: Path, screenshot: str, size: str, name: str) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"docs/assets/{name}.png stays as it is: neither chromium nor google-chrome is installed")
        return
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={size.replace('x', ',')}"]
    target = f"--screenshot={PICTURES / name}.png"
    subprocess.run([browser, *options, target, (folder / screenshot).as_uri()], check=True, capture_output=True)


def run_block(
    language: str, code: str, folder: Path, variables: dict[str, object], options: dict[str, str]
) -> list[tuple[str, str]]:
    """Run a block; return (command, what it printed) of each of its commands."""
    first_line = code.partition("\n")[0].removeprefix("# ")
    if language == "toml" or re.fullmatch(r"\w+\.py", first_line):
        (folder / first_line).write_text(code, encoding="utf-8")
        if language == "toml":
            return []
    if language == "python":
        return [("", run_python(code, folder, variables))]
    commands = [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]
    ours = [command for command in commands if command.startswith("peftcore ")]
    return [(command, run_command(command, folder, options)) for command in ours]


def run_python(code: str, folder: Path, variables: dict[str, object]) -> str:
    printed = io.StringIO()
    previous = Path.cwd()
    os.chdir(folder)
    os.environ["MPLBACKEND"] = "agg"
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<page>", "exec"), variables)
    finally:
        os.chdir(previous)
    return printed.getvalue()


def run_command(command: str, folder: Path, options: dict[str, str]) -> str:
    print(f"$ {command}", flush=True)
    words = [sys.executable, "-m", "peftcore_cli", *shlex.split(command, comments=True)[1:]]
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "HF_HUB_OFFLINE": "1"}
    if "picture" in options:
        environment["FORCE_COLOR"] = "1"
    finished = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        input=options.get("typed", "").replace("|", "\n") + "\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if finished.returncode:
        raise SystemExit(f"{command}\n{finished.stdout}\n{finished.stderr}")
    printed = finished.stdout.replace(f"{folder.resolve()}/", "")  # a reader runs them in a folder of his own
    for line in options.get("typed", "").split("|"):
        printed = printed.replace("> ", f">\0{line}\n", 1)
    return printed.replace("\0", " ")


def shown(printed: list[tuple[str, str]], options: dict[str, str]) -> str:
    """Return the block of text, or the picture, that stands for what was printed."""
    lines = []
    for command, output in printed:
        if len(printed) > 1:
            lines.append(f"$ {command}")
        lines += output.strip("\n").splitlines()
    lines = [line.rstrip() for line in lines]
    if "first" in options or "last" in options:
        first, last = int(options.get("first", 0)), int(options.get("last", 0))
        if len(lines) > first + last + 1:
            lines = [*lines[:first], "...", *lines[len(lines) - last :]]
    if "picture" in options:
        return picture(lines, options["picture"])
    return "\n".join(["```text", *lines, "```"])


def notebook(text: str, folder: Path) -> str:
    """Run the cells of a notebook in a folder, as Jupyter does; return the notebook with their outputs."""
    document = json.loads(text)
    module = types.ModuleType("notebook")
    sys.modules["notebook"] = module  # classes of a cell can be pickled
    code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell["execution_count"] = number
        cell["outputs"] = run_cell("".join(cell["source"]), folder, vars(module))
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def run_cell(code: str, folder: Path, variables: dict[str, object]) -> list[dict[str, object]]:
    import matplotlib.pyplot as plt

    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    outputs: list[dict[str, object]] = []
    printed = run_python(ast.unparse(tree), folder, variables)
    value = None
    if last is not None:
        variables["_"] = None
        printed += run_python(f"_ = {ast.unparse(last)}", folder, variables)
        value = variables["_"]
    if printed:
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    for figure in map(plt.figure, plt.get_fignums()):
        image = io.BytesIO()
        figure.savefig(image, dpi=80, bbox_inches="tight")
        picture = {"image/png": base64.b64encode(image.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": picture})
    plt.close("all")
    if value is not None:
        shown = {"text/plain": [repr(value)]}
        result = {"output_type": "execute_result", "metadata": {}, "data": shown, "execution_count": None}
        outputs.append(result)
    return outputs


def picture(lines: list[str], name: str) -> str:
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in lines:
        console.print(Text.from_ansi(line))
    console.save_svg(str(PICTURES / f"{name}.svg"), title="peftcore")
    return f"![The terminal]({os.path.join('assets', name + '.svg')})"


def pages_with_output() -> list[Path]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    shown = [page for page in pages if "\n<!-- output" in page.read_text(encoding="utf-8")]
    return shown + sorted((ROOT / "examples/notebooks").glob("*.ipynb"))


if __name__ == "__main__":
    main([Path(page).resolve() for page in sys.argv[1:]] or pages_with_output())
