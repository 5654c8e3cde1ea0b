"""The documentation: links work, reference pages have everything, quoted messages are those of the code.

``.ci/build-docs`` checks more: it builds the site with every warning as an error.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import reference_pages

import kempnerforge
from kempnerforge import errors
from kempnerforge.config.field_docs import walk_keys
from kempnerforge.config.schema import JobConfig

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ENTRANCES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md")]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
CODE_BLOCK = re.compile(r"^ *```.*?^ *```", re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown's table of contents makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE_BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for target, anchor in LINK.findall(CODE_BLOCK.sub("", page.read_text())):
        if "://" in target:
            continue
        file = page if not target else (page.parent / target).resolve()
        generated = file.name in ("api.md", "config.md", "commands.md")
        if not file.exists():
            yield f"{page.relative_to(ROOT)}: {target}"
        elif anchor and not generated and anchor not in anchors(file):
            yield f"{page.relative_to(ROOT)}: {target}#{anchor}"


def test_docs_links_lead_to_files_and_headings() -> None:
    assert [link for page in [*ENTRANCES, *PAGES] for link in broken_links(page)] == []


def test_docs_link_check_finds_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A `b` c\n[good](#a-b-c) [gone](other.md) [wrong](page.md#x)\n```\n[code](y.md)\n```\n")
    assert list(broken_links(page)) == ["page.md: other.md", "page.md: page.md#x"]


def test_docs_navigation_has_every_page() -> None:
    listed = re.findall(r"[\w-]+(?:/[\w-]+)?\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_docs_paths_in_code_exist() -> None:
    files = [path for folder in ("kempnerforge", "tests") for path in (ROOT / folder).rglob("*.py")]
    named = {
        name
        for path in files
        for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text())
        if path != Path(__file__)
    }
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_docs_config_page_has_every_key() -> None:
    page = reference_pages.on_page_markdown((DOCS / "reference/config.md").read_text())
    assert [key.name for key in walk_keys(JobConfig) if f"`{key.name}`" not in page] == []


def test_docs_commands_page_has_every_command() -> None:
    page = reference_pages.on_page_markdown((DOCS / "reference/commands.md").read_text())
    headings = re.findall(r"^## kempnerforge (.*)$", page, re.M)
    assert {"ckpt ls", "ckpt export", "import hf", "plan", "submit", "wandb sync"} <= set(headings)
    assert "<!--" not in page


def test_docs_api_page_has_every_public_name() -> None:
    page = (DOCS / "reference/api.md").read_text()
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", page, re.M)}
    assert documented == {*kempnerforge.__all__, "errors"}


def test_docs_dependencies_page_has_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    page = (DOCS / "design/dependencies.md").read_text()
    names = {re.split(r"[^\w-]", name)[0] for name in [*project["dependencies"], *extras]} - {"kempnerforge"}
    assert [name for name in sorted(names) if f"`{name}" not in page] == []


def test_docs_exit_statuses_are_those_of_the_code() -> None:
    page = (DOCS / "reference/exit-statuses.md").read_text()
    statuses = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(status) for status in re.findall(r"^\| (\d+) \|", page, re.M)} == statuses


# Troubleshooting


def texts_of_code() -> list[str]:
    """Every string of the package; what is filled into an f-string is an ellipsis."""
    texts = []
    for path in (ROOT / "kempnerforge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_docs_troubleshooting_quotes_messages_of_the_code() -> None:
    page = (DOCS / "guide/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]*)` \|", page, re.M)
    assert len(messages) > 50
    texts = texts_of_code()
    unknown = []
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part) for part in re.split(r"\s*…\s*", message)), re.S)
        if not any(pattern.search(text) for text in texts):
            unknown.append(message)
    assert unknown == []
