"""What CONTRIBUTING.md asks of tests and a machine can check."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
FOLDERS = {"unit", "distributed", "e2e", "gpu", "slurm", "campaigns", "benchmarks", "repo"}
MAX_NAME = 60
TARGET = re.compile(r"[a-z_]\w*(\.\w+)*:[A-Za-z_][\w.]*")


def test_test_files_are_in_known_folders_with_own_names() -> None:
    tests = [path for path in FILES if path.name.startswith("test_")]
    assert {path.parent.name for path in tests} == FOLDERS
    assert [name for name, count in Counter(path.name for path in tests).items() if count > 1] == []


def test_test_names_are_short_and_unique_in_a_file() -> None:
    found = []
    for path in FILES:
        names = [
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        wrong = [name for name, count in Counter(names).items() if count > 1 or len(name) > MAX_NAME]
        found += [f"{path.relative_to(TESTS)}: {name}" for name in wrong]
    assert found == []


def unchecked_targets(tree: ast.AST) -> Iterator[str]:
    """Strings that name an attribute of a module and are not looked up by ``patch_target``."""
    checked = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("patch_target")
        for argument in node.args
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in checked:
            named = node.value.startswith(("kempnerforge.", "os:", "torch."))
            if named and TARGET.fullmatch(node.value):
                yield node.value
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr") and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and str(first.value).startswith("kempnerforge."):
                yield str(first.value)


def test_patch_targets_are_looked_up_at_import() -> None:
    found = [
        f"{path.relative_to(TESTS)}: {name}"
        for path in FILES
        if path != Path(__file__)  # it has examples
        for name in unchecked_targets(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('KILL = ("kill_at_call", {"target": "kempnerforge.fsio:publish"})', ["kempnerforge.fsio:publish"]),
        ('KILL = patch_target("kempnerforge.fsio:publish")', []),
        ('monkeypatch.setattr("kempnerforge.fsio.publish", fail)', ["kempnerforge.fsio.publish"]),
        ('monkeypatch.setattr(fsio, "publish", fail)', []),
        ('replace("os:fsync")', ["os:fsync"]),
        ('text = "kempnerforge.fsio: publish"', []),
    ],
)
def test_patch_targets_check_finds_each_kind(code: str, found: list[str]) -> None:
    assert list(unchecked_targets(ast.parse(code))) == found
