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


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    sections = {
        title: pages for section in config.nav or () if isinstance(section, dict) for title, pages in section.items()
    }
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
    """Return a plugin's README as a page of the folder `methods`."""
    page = re.sub(r"\A# .*", f"# {name}", readme)
    page = page.replace("](../../README.md)", "](../index.md)").replace("](../../docs/", "](../")
    return re.sub(r"\]\(\.\./peftcore-([\w-]+)/README\.md", r"](\1.md", page)


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
        parts += [f"## peftcore {name}", command.help or ""]
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
