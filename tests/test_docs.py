"""What README and the pages of docs/ show is true: their code runs, in its order, and what they name exists."""

import ast
import dataclasses
import json
import pkgutil
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support import figures, guide_files, matrix
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import peftcore
from peftcore.plugin.registry import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMING_FROM = sorted((ROOT / "docs/coming-from").glob("*.md"))
DAILY_GUIDES = ("classification.md",)  # the others run in `make test-all`
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("plugins/*/README.md"))]  # nothing is run
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a tiny one stands in for it, as a folder where the code runs
# A block of code, unless the line above says that it is not run here, and why.
BLOCK = re.compile(r"(<!-- not run here: [^\n]* -->\n)?```(python|sh|toml)\n(.*?)```", re.DOTALL)
# parts of one module, of which test_tutorial.py runs the whole
NOT_RUN = {"plugins.md", "plugin-contract.md", "plugin-hooks.md"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of those that are run."""
    found = BLOCK.findall(page.read_text())
    return [(language, code) for why, language, code in found if not why and page.name not in NOT_RUN]


def _marked(page: Path) -> Any:
    is_daily = page.parent.name not in ("guides", "coming-from") or page.name in DAILY_GUIDES
    return pytest.param(page, marks=() if is_daily else pytest.mark.nightly)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model and the data that the pages name."""
    from peftcore_cli.tasks.conversations import CHATML
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "oo"])}
    letters = Tokenizer(models.BPE(vocabulary, [("o", "o")]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHATML
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **special))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / MODEL)
    for path in [ROOT / "examples/chat.jsonl", *(ROOT / "examples/data").glob("*.jsonl")]:
        # Sixteen rows keep a test short, and each tag of words.jsonl is in two of them, so one can be held out.
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[:16]
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("".join(rows), encoding="utf-8")
    shutil.copy(tmp_path / "examples/chat.jsonl", tmp_path / "chat.jsonl")  # pages without data of their own name it
    monkeypatch.chdir(tmp_path)

    def no_line(_prompt: str) -> str:
        raise EOFError

    def no_picture(_what: str, _draw: object) -> str:
        return ""

    monkeypatch.setattr("builtins.input", no_line)
    monkeypatch.setattr(
        "peftcore_cli.training.training_report._picture", no_picture
    )  # a third of a training this short
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # of Trainer, on a machine without a card
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")  # TRL gives it to transformers
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")  # diffusers 0.36, when it is imported
@pytest.mark.parametrize("page", [_marked(page) for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if page.name in ("diffusers.md", "diffusion.md"):
        pytest.importorskip("diffusers", reason="diffusers is not installed (extra `test`)")
    if page.name == "will-it-fit.md":
        pytest.importorskip("trl", minversion="1.16")  # whose releases need Python 3.11
    for name, make in guide_files.MODELS.items():
        if name in page.read_text():
            make(place / name)
    names: dict[str, object] = {}
    for language, code in blocks(page):
        if language == "python":
            named = re.match(r"# (\w+\.py)\n", code)
            if named:
                Path(named[1]).write_text(code)
            exec(compile(code, page.name, "exec"), names)
            continue
        if language == "toml":
            name = code.partition("\n")[0].removeprefix("# ")
            assert name.endswith(".toml"), f"the first line of a file is its name: {name}"
            Path(name).write_text(code)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            run(line)


@pytest.mark.nightly
@pytest.mark.parametrize("notebook", sorted((ROOT / "examples/notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_run(notebook: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    module = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)  # classes of a cell can be pickled
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), notebook.name, "exec"), vars(module))


def run(line: str) -> None:
    """A command of ours; what installs is run by CI itself."""
    import shlex

    from peftcore_cli.app import build
    from typer.testing import CliRunner

    words = shlex.split(line, comments=True)
    if words[:1] != ["peftcore"]:
        assert words[:1] in ([], ["make"], ["pip"], ["."]), line
        return
    if words[1] == "train" and "--steps" not in words:
        words += ["--steps", "2"]  # the page shows the training that learns something
    result = CliRunner().invoke(build(words[1:]), words[1:])
    assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:\s]+)\)", text):
        assert (page.parent / target).exists(), target
    for note in re.findall(r"<!-- not run here: (.*?) -->", text):  # names the test that runs the code instead
        for path in re.findall(r"[\w/-]+\.py", note):
            assert (ROOT / path).exists(), path
    for _, language, code in BLOCK.findall(text):
        for name in re.findall(r"peftcore\.(\w+)", code) if language == "python" else ():
            assert hasattr(peftcore, name), name
    for command in re.findall(r"\bmake ([a-z][a-z0-9-]*)\b", re.sub(r"[^`]*`([^`]*)`", r" \1 ", text)):
        assert f"\n{command}:" in (ROOT / "Makefile").read_text(), command


def test_what_peft_has_is_there_and_what_stands_for_it_too() -> None:
    rows = re.findall(r"^\| `(peft\.[\w.]+)` \| (.*) \|$", (ROOT / "docs/from-peft.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    for theirs, ours in rows:
        assert pkgutil.resolve_name(theirs) is not None
        for name in re.findall(r"`(peftcore\.\w+)`", ours):
            assert pkgutil.resolve_name(name) is not None


def test_the_errors_that_are_explained_exist() -> None:
    words = "\n".join(
        node.value
        for path in [
            *(ROOT / "peftcore").rglob("*.py"),
            *(ROOT / "plugins").glob("*/peftcore_*/**/*.py"),
            *(ROOT / "plugins").glob("*/*.py"),
        ]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)
    named = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(named) > 30
    assert [text for text in named if text not in words] == []


def test_the_options_that_stand_for_others_exist() -> None:
    import typer
    from peftcore_cli.app import build

    train = typer.main.get_command(build(["train"])).commands["train"]  # type: ignore[attr-defined]
    options = {each for option in train.params for each in option.opts}
    for page in COMING_FROM:
        named = set(re.findall(r"`(--[a-z-]+)", page.read_text().replace("`peftcore export --format", "")))
        assert named <= options, page.name


@pytest.mark.parametrize(
    "page", [page for page in COMING_FROM if "```yaml" in page.read_text()], ids=lambda page: page.name
)
def test_the_keys_of_other_programs_files_are_in_the_table(page: Path) -> None:
    text = page.read_text()
    shown = set(re.findall(r"\w{4,}", " ".join(re.findall(r"^\| (.*?) \| ", text, re.MULTILINE))))
    files = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    keys = {key for file in files for key in re.findall(r"^[\s-]*(\w{4,}):", file, re.MULTILINE)} - {"type", "path"}
    assert keys - shown == set()


@pytest.mark.parametrize(
    "page", [page for page in COMING_FROM if "```toml" in page.read_text()], ids=lambda page: page.name
)
def test_train_accepts_the_configs_next_to_those_of_other_programs(page: Path, tmp_path: Path) -> None:
    import typer
    from peftcore_cli.app import build
    from peftcore_cli.config_file import fields

    train = typer.main.get_command(build(["train"])).commands["train"]  # type: ignore[attr-defined]
    for code in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        (tmp_path / "run.toml").write_text(code)
        context = train.make_context("train", ["--config", str(tmp_path / "run.toml"), "--output", "run"])
        values = dict(field.split("=", 1) for field in fields(context, None))
        names = {field.name for field in dataclasses.fields(registry.method(context.params["method"]).config_class)}
        assert values and values.keys() <= names


def test_every_public_name_is_in_the_api() -> None:
    listed = re.findall(r"^::: peftcore\.([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert set(peftcore.__all__) <= set(listed)
    assert len(listed) == len(set(listed))


def test_the_table_of_methods_is_that_of_the_conformance_runs() -> None:
    reports, page = matrix.read(), (ROOT / "docs/method-support.md").read_text()
    assert reports.keys() == registry.methods().keys(), "run: make matrix"
    assert matrix.section(page) == matrix.table(reports), "run: make matrix"
    for name in registry.methods():
        assert f"| [`{name}`](../plugins/peftcore-{name}/README.md) |" in (ROOT / "docs/methods.md").read_text(), name


def test_all_figures_are_made_from_the_data_file() -> None:
    assert figures.PAGE.read_text() == figures.page(), "run: make figures"
    for row in figures.rows():
        script = re.search(r"\b(?:benchmarks|tests)/[\w/]+\.py", row["command"])
        assert script is None or (ROOT / script[0]).exists(), row["command"]


def test_figures_in_other_pages_are_in_the_data_file() -> None:
    pages = [page for page in PAGES if "<!-- figures -->" in page.read_text()]
    assert {"README.md", "index.md", "performance.md"} <= {page.name for page in pages}
    assert {page.name: figures.missing(page.read_text()) for page in pages} == {page.name: [] for page in pages}


def test_the_methods_of_peft_s_that_are_not_here_are_listed() -> None:
    section = (ROOT / "docs/methods.md").read_text().partition("## PEFT's methods that are not here\n")[2]
    listed = re.findall(r"^\| `([A-Z0-9_]+)` \|", section.partition("\n## ")[0], re.MULTILINE)
    known = json.loads((ROOT / "peftcore/plugin/peft_defaults.json").read_text())["defaults"].keys()
    here = {m.state.peft_type for m in registry.methods().values()}
    assert set(listed) == known - here


def test_the_readme_names_methods_that_are_installed() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Methods\n")[2].partition("\n## ")[0]
    assert "(docs/methods.md)" in section
    names = set(re.findall(r"`([a-z0-9-]+)`", section))
    assert names and names <= registry.methods().keys()


def anchors(page: Path) -> set[str]:
    """Return the anchors that the site gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[-\s]+", "-", title) for title in titles}


def test_links_to_headings_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", page.read_text()):
            assert anchor in anchors(page.parent / target if target else page), f"{page.name}: {target}#{anchor}"
