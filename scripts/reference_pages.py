"""Fill the reference pages of the documentation site from the code. ``mkdocs.yml`` names this file as a hook.

``python scripts/reference_pages.py`` prints the generated parts.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer.main

from kempnerforge.cli.app import app
from kempnerforge.config.field_docs import item_section, nested_section, walk_keys
from kempnerforge.config.job import JobConfig

GENERAL = ("help", "install_completion", "show_completion")
"""Options that every command has."""


def config_keys() -> str:
    """Return one table of keys for each section of a configuration file."""
    blocks = []
    for name, field in JobConfig.model_fields.items():
        section = nested_section(field) or item_section(field)
        assert section is not None
        rows = ["| key | values | default |", "|---|---|---|"]
        is_list = item_section(field) is not None
        for key in walk_keys(section, f"{name}[]." if is_list else f"{name}."):
            values = prose(key.allowed).replace("|", "\\|")
            rows.append(f"| `{key.name}`{{ #{key.name} }}<br>{cell(key.doc)} | {values} | `{key.default}` |")
        summary = (section.__doc__ or "").splitlines()[0]
        if is_list:
            summary += f" `{name}` is a list of such tables."
        head = f"[[{name}]]" if is_list else f"[{name}]"
        blocks.append(f"## {head} {{ #{name} }}\n\n{summary}\n\n" + "\n".join(rows))
    return "\n\n".join(blocks)


def commands() -> str:
    """Return usage, arguments and options of every command."""
    root = typer.main.get_command(app)
    return "\n\n".join(describe(path, command) for path, command in leaves(root, "kempnerforge"))


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command that is no group, with the words that call it."""
    if not hasattr(command, "list_commands"):
        yield path, command
        return
    context = command.make_context(path, [], resilient_parsing=True)
    for name in command.list_commands(context):
        yield from leaves(command.get_command(context, name), f"{path} {name}")


def describe(path: str, command: Any) -> str:
    """Return the section of one command."""
    context = command.make_context(path, [], resilient_parsing=True)
    usage, rows = [path, "[OPTIONS]"], []
    for parameter in command.get_params(context):
        if parameter.name in GENERAL or parameter.hidden:
            continue
        if parameter.param_type_name == "argument":
            names = [parameter.metavar or parameter.name.upper()]
            usage += names if parameter.required else [f"[{names[0]}]"]
        else:
            value = "" if parameter.is_flag else f" {parameter.metavar or 'VALUE'}"
            names = [f"{name}{value}" for name in (*parameter.opts, *parameter.secondary_opts)]
        shown = ", ".join(f"`{name}`" for name in names)
        rows.append(f"| {shown} | {cell(parameter.help or '')}{default_of(parameter)} |")
    table = "\n".join(["| argument or option | |", "|---|---|", *rows])
    text = inspect.cleandoc(command.help or "").replace("\f", "").replace("\b\n", "")
    return f"## {path}\n\n```text\n{' '.join(usage)}\n```\n\n{prose(text)}\n\n{table}"


def prose(text: str) -> str:
    """Return text of a help page in which Markdown changes nothing."""
    return "".join(f"\\{letter}" if letter in "\\*_<>[]" else letter for letter in text)


def default_of(parameter: Any) -> str:
    """Return the default value of an option, where it says something."""
    default = getattr(parameter.default, "value", parameter.default)
    if default is None or callable(default) or isinstance(default, bool) or default in ("", (), []):
        return ""
    return f" Default: `{default}`."


def cell(text: str) -> str:
    """Return text that cannot end a cell of a table or begin an HTML tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


PLACES: dict[str, Callable[[], str]] = {
    "<!-- generated: configuration keys -->": config_keys,
    "<!-- generated: commands -->": commands,
}
"""What a page says in the place of each comment."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with its comments replaced; mkdocs calls this for every page."""
    for comment, generate in PLACES.items():
        if comment in markdown:
            markdown = markdown.replace(comment, generate())
    return markdown


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(generate() for generate in PLACES.values()) + "\n")
