"""Pages of the site that mkdocs makes from other files: one for each method, and the options of the commands."""

import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import peftcore

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = "commands.md"
DRAWINGS = {"lora": "lora.svg", "qlora": "nf4.svg"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    sections = {
        title: pages for section in config.nav or () if isinstance(section, dict) for title, pages in section.items()
    }
    config.copyright = f"peftcore {peftcore.__version__}"
    sections["Methods"].append({"Each method": [{name: f"methods/{name}.md"} for name in sorted(peftcore.methods())]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in peftcore.methods():
        readme = (ROOT / f"plugins/peftcore-{name}/README.md").read_text(encoding="utf-8")
        files.append(File.generated(config, f"methods/{name}.md", content=method_page(name, readme)))
    files.append(File.generated(config, COMMANDS, content=command_reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to a plugin's README to its page on the site."""
    to_top = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)+plugins/peftcore-([\w-]+)/README\.md", rf"]({to_top}methods/\1.md", markdown)


def method_page(name: str, readme: str) -> str:
    """Return a plugin's README as a page of the folder `methods`, with its rows of the comparison."""
    page = re.sub(r"\A# .*", f"# {name}", readme)
    page = page.replace("](../../README.md)", "](../index.md)").replace("](../../docs/", "](../")
    page = re.sub(r"\]\(\.\./peftcore-([\w-]+)/README\.md", r"](\1.md", page)
    if name in DRAWINGS:
        title, introduction, rest = page.split("\n\n", 2)
        page = "\n\n".join([title, introduction, f"![{name}](../assets/{DRAWINGS[name]})", rest])
    where = "[Concepts](../concepts.md#where-methods-enter-a-model) shows where methods enter a model."
    return f"{page.rstrip()}\n\n{results(name)}{where}\n"


def results(name: str) -> str:
    """Return the rows of a method and of the untrained model in each table of the comparison."""
    parts = []
    comparison = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", comparison, flags=re.MULTILINE):
        title = section.partition("\n")[0]
        table = re.search(r"^\| method \| rate .*?(?=\n\n)", section, re.MULTILINE | re.DOTALL)
        if table is None:
            continue
        header, line, *rows = table[0].splitlines()
        measured = [row for row in rows if row.startswith((f"| `{name}`", "| before training"))]
        if len(measured) > 1:
            parts += [f"{title}:", "\n".join([header, line, *measured])]
    if not parts:
        return ""
    caveat = "From the [comparison of all methods](../comparison.md), whose runs are too short to rank methods."
    return "\n\n".join(["## Results", caveat, *parts]) + "\n\n"


def command_reference() -> str:
    """Return a page with every command, its arguments and its options by group."""
    from peftcore_cli.app import build

    application = typer.main.get_command(build([]))
    assert isinstance(application, typer.core.TyperGroup)
    intro = (
        "Made from the `--help` of each command. [The command line](command-line.md) explains how they work together."
    )
    parts = ["# Commands and options", intro]
    for name, command in application.commands.items():
        parts += [f"## peftcore {name}", re.sub(r"\bdocs/([\w-]+)\.md", r"[\1](\1.md)", command.help or "")]
        groups: dict[str, list[str]] = {}
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                title = getattr(parameter, "rich_help_panel", None) or "Options"
                groups.setdefault(title, []).append(option_row(parameter))
        for title, rows in groups.items():
            parts.append("\n".join([f"**{title}**\n", "| option | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def option_row(parameter: typer.core.TyperOption | typer.core.TyperArgument) -> str:
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or (parameter.name or '').upper()}`"
    else:
        names = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
    default = "required" if parameter.required else ""
    if not parameter.required and parameter.default not in (None, False, (), []):
        default = f"`{parameter.default}`"
    return f"| {names} | {default} | {cell(parameter.help or '')} |"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
