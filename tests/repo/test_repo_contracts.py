"""What the repository promises about itself: README, CI, licence, docstrings, and no swallowed errors."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "kempnerforge").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in listing.decode().split("\0") if name and (path := ROOT / name).is_file()]


# README and .ci/run


def quick_start_commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split("\n## Quick start\n", 1)[1].split("\n## ", 1)[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return block.splitlines()


def test_the_quick_start_is_two_commands_that_do_their_own_set_up() -> None:
    train, test = quick_start_commands()
    assert train.startswith("pip install ")
    assert train.endswith("torchrun --nproc-per-node 2 scripts/train.py --config configs/quickstart.toml")
    assert test.startswith("pip install ")
    assert "[dev]" in test
    assert test.endswith("python -m pytest")


INSTALLERS = (".ci/install-slurm", ".ci/install-chromium")


def test_ci_runs_the_readme_commands() -> None:
    steps = subprocess.run(
        [ROOT / ".ci" / "run", "--list"], capture_output=True, text=True, check=True
    ).stdout
    checks = ["ruff check", "ruff format --check", "pyright"]
    assert steps.splitlines() == [*INSTALLERS, *quick_start_commands(), *checks]


README_OF_A_COPY = """# A project

```bash
echo elsewhere
```

## Quick start

```bash
{first}
{second}
```

## More
"""
SECOND = (
    'cp tool "$VIRTUAL_ENV/bin/ruff" && cp tool "$VIRTUAL_ENV/bin/pyright" && echo "== 3 passed in 0.12s =="'
)


def run_ci_on_a_copy(folder: Path, first: str) -> subprocess.CompletedProcess[str]:
    """Run ``.ci/run`` in a small repository of its own, with ``first`` as its quick start."""
    repo, scratch = folder / "repo", folder / "scratch"
    (repo / ".ci").mkdir(parents=True)
    scratch.mkdir()
    (repo / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (repo / ".ci" / "run").chmod(0o755)
    for name in INSTALLERS:
        (repo / name).write_text("#!/bin/sh\necho installed\n")
        (repo / name).chmod(0o755)
    (repo / "README.md").write_text(README_OF_A_COPY.format(first=first, second=SECOND))
    (repo / "tool").write_text('#!/bin/sh\necho "tool: $(basename "$0") $*"\n')
    (repo / "tool").chmod(0o755)
    git = ["git"]
    for setting in (
        "user.name=t",
        "user.email=t@example.org",
        "commit.gpgsign=false",
        "core.hooksPath=/dev/null",
    ):
        git += ["-c", setting]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], cwd=repo, check=True)
    (repo / "untracked").touch()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(
        [repo / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert list(scratch.iterdir()) == []
    return done


def test_ci_works_in_fresh_clones_and_ends_with_the_line_of_pytest(tmp_path: Path) -> None:
    done = run_ci_on_a_copy(
        tmp_path, 'test ! -e untracked && test "$(command -v python)" = "$VIRTUAL_ENV/bin/python"'
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tool: ruff check\n" in done.stdout
    assert "tool: ruff format --check\n" in done.stdout
    assert "tool: pyright \n" in done.stdout
    results = re.findall(
        r"^(slurm|browser|quick start|tests|ruff check|ruff format|pyright) +ok +\d+$",
        done.stdout,
        re.MULTILINE,
    )
    assert len(results) == 7
    assert done.stdout.splitlines()[-1] == "== 3 passed in 0.12s =="


def test_ci_fails_when_one_step_fails_and_runs_the_others(tmp_path: Path) -> None:
    done = run_ci_on_a_copy(tmp_path, "exit 3")
    assert done.returncode == 1
    assert re.search(r"^quick start +exit 3 +\d+$", done.stdout, re.MULTILINE)
    assert len(re.findall(r" ok +\d+$", done.stdout, re.MULTILINE)) == 6


def test_ci_refuses_a_quick_start_of_another_form(tmp_path: Path) -> None:
    done = run_ci_on_a_copy(tmp_path, "echo one\necho two")
    assert done.returncode == 1
    assert "one bash block of two lines" in done.stderr


# Files


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "pyproject.toml"]
)
def test_the_file_exists_and_says_something(name: str) -> None:
    assert len((ROOT / name).read_text()) > 100


def test_the_licence_is_mit() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n\nCopyright (c) 2026 The KempnerForge authors\n")
    assert 'license = "MIT"' in (ROOT / "pyproject.toml").read_text()


# In this form the pattern does not find itself.
MACHINE_PATH = re.compile(rb"(?<![\w.\-/}$~])/(?:work|root|Users|tmp/kf)/")


def test_no_tracked_file_names_paths_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.decode(errors='replace').strip()}"
        for path in tracked_files()
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_paths_of_one_machine_are_found() -> None:
    absolute = "".join(["see ", "/", "work/main/x"]).encode()
    assert MACHINE_PATH.search(absolute)
    assert not MACHINE_PATH.search(b"runs/work/x and $HOME/work/x")


# Source


def swallowed_errors(tree: ast.AST) -> Iterator[int]:
    """Lines of handlers that catch everything and do nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "BaseException"
            does_nothing = all(
                isinstance(statement, ast.Pass)
                or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                for statement in node.body
            )
            if does_nothing and re.search(r"\b(Base)?Exception\b", caught):
                yield node.lineno
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("suppress")
            and any(ast.unparse(argument) in ("Exception", "BaseException") for argument in node.args)
        ):
            yield node.lineno


def missing_docstrings(tree: ast.Module) -> Iterator[str]:
    """Public classes, functions and methods of public classes without a docstring; the module itself too."""
    if tree.body and not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        yield from undocumented(node, "")


def undocumented(node: ast.stmt, prefix: str) -> Iterator[str]:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith(
        "_"
    ):
        return
    overloaded = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
    setter = any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list)
    if not ast.get_docstring(node) and not overloaded and not setter:
        yield prefix + node.name
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            yield from undocumented(inner, f"{prefix}{node.name}.")


def test_no_error_is_swallowed() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in swallowed_errors(ast.parse(path.read_text()))
    ]
    assert found == []


def test_everything_public_has_a_docstring() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name in missing_docstrings(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("try:\n    f()\nexcept:\n    pass\n", [3]),
        ("try:\n    f()\nexcept Exception:\n    pass\n", [3]),
        ("try:\n    f()\nexcept (OSError, BaseException) as e:\n    ...\n", [3]),
        ("with contextlib.suppress(Exception):\n    f()\n", [1]),
        ("try:\n    f()\nexcept OSError:\n    pass\n", []),
        ("try:\n    f()\nexcept Exception:\n    log()\n", []),
        ("with suppress(OSError):\n    f()\n", []),
    ],
)
def test_swallowed_errors_are_found(code: str, lines: list[int]) -> None:
    assert list(swallowed_errors(ast.parse(code))) == lines


def test_missing_docstrings_are_found() -> None:
    code = """
def public(): ...
def _private(): ...
class Public:
    '''Documented.'''
    def method(self): ...
    def __len__(self): ...
    @value.setter
    def value(self, v): ...
class _Private:
    def method(self): ...
def documented():
    '''Says what it does.'''
    def inner(): ...
"""
    assert list(missing_docstrings(ast.parse(code))) == ["the module", "public", "Public.method"]
