"""What the repository promises about itself: README, CI, licence, docstrings, and no swallowed errors."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    [
        *(ROOT / "kempnerforge").rglob("*.py"),
        *(ROOT / "scripts").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
)


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in listing.decode().split("\0") if name and (path := ROOT / name).is_file()]


# README and .ci/run


def quick_start_commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split("\n## Quick start\n", 1)[1].split("\n## ", 1)[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return block.splitlines()


def test_readme_quick_start_is_two_self_contained_commands() -> None:
    train, test = quick_start_commands()
    assert train.startswith("pip install ")
    assert " && kempnerforge train configs/quickstart.toml --processes 2 && " in train
    assert ' && kempnerforge generate runs/quickstart --prompt "' in train
    assert test.startswith("pip install ")
    assert "[dev]" in test
    assert test.endswith("python -m pytest")


INSTALLERS = (".ci/install-slurm", ".ci/install-chromium")
BUILD_DOCS = ".ci/build-docs"
STEPS = ["slurm", "browser", "quick start", "tests", "other tests", "campaigns", "static checks", "docs"]


def test_ci_list_has_readme_commands_then_all_other_tests() -> None:
    steps = subprocess.run(
        [ROOT / ".ci" / "run", "--list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    others = ["python -m pytest --rest --ignore tests/campaigns", "python -m pytest --rest tests/campaigns"]
    assert steps == [*INSTALLERS, *quick_start_commands(), *others, "scripts/check --static", BUILD_DOCS]


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
SECOND = 'cp tool "$VIRTUAL_ENV/bin/ruff" && cp tool "$VIRTUAL_ENV/bin/pyright" && python -m pytest'
# A virtual environment without pip takes a tenth of the time, and nothing is installed in it here.
PYTHON_WITHOUT_PIP = """#!/bin/sh
[ "$2" = venv ] && exec {python} -m venv --without-pip "$3"
exec {python} "$@"
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run_ci_on_a_copy(folder: Path, first: str) -> subprocess.CompletedProcess[str]:
    """Run ``.ci/run`` in a small repository of its own, with ``first`` as its quick start."""
    repo, scratch = folder / "repo", folder / "scratch"
    scratch.mkdir()
    for name in (".ci/run", "scripts/check"):
        write_program(repo / name, (ROOT / name).read_text())
    for name in (*INSTALLERS, BUILD_DOCS):
        write_program(repo / name, "#!/bin/sh\necho installed\n")
    (repo / "README.md").write_text(README_OF_A_COPY.format(first=first, second=SECOND))
    (repo / "pytest.py").write_text("import sys\nprint(f'== {len(sys.argv)} passed in 0.12s ==')\n")
    write_program(repo / "tool", '#!/bin/sh\necho "tool: $(basename "$0") $*"\n')
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
    write_program(folder / "bin/python3", PYTHON_WITHOUT_PIP.format(python=sys.executable))
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "TMPDIR": str(scratch), "PATH": path}
    done = subprocess.run(
        [repo / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert list(scratch.iterdir()) == []
    return done


def test_ci_runs_all_steps_in_fresh_clones(tmp_path: Path) -> None:
    done = run_ci_on_a_copy(
        tmp_path, 'test ! -e untracked && test "$(command -v python)" = "$VIRTUAL_ENV/bin/python"'
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tool: ruff check\n" in done.stdout
    assert "tool: ruff format --check\n" in done.stdout
    assert "tool: pyright \n" in done.stdout
    assert re.findall(rf"^({'|'.join(STEPS)}) +ok +\d+$", done.stdout, re.MULTILINE) == STEPS
    assert done.stdout.splitlines()[-3:] == [f"== {n} passed in 0.12s ==" for n in (1, 4, 3)]


def test_ci_one_step_fails_others_still_run(tmp_path: Path) -> None:
    done = run_ci_on_a_copy(tmp_path, "exit 3")
    assert done.returncode == 1
    assert re.search(r"^quick start +exit 3 +\d+$", done.stdout, re.MULTILINE)
    assert len(re.findall(r" ok +\d+$", done.stdout, re.MULTILINE)) == len(STEPS) - 1


def test_ci_quick_start_of_another_form_is_refused(tmp_path: Path) -> None:
    done = run_ci_on_a_copy(tmp_path, "echo one\necho two")
    assert done.returncode == 1
    assert "one bash block of two lines" in done.stderr


def run_check(folder: Path, *arguments: str, failing: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``scripts/check`` with tools that print their names; the one called ``failing`` ends with 3."""
    for name in ("ruff", "pyright", "python"):
        status = 3 if name == failing else 0
        write_program(folder / name, f'#!/bin/sh\necho "ran: {name} $*"\nexit {status}\n')
    return subprocess.run(
        [ROOT / "scripts/check", *arguments],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


CHECKS = ["ruff check", "ruff format --check", "pyright "]


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], [*CHECKS, "python -m pytest"]), (["--static"], CHECKS)]
)
def test_check_runs_what_ci_runs(tmp_path: Path, arguments: list[str], expected: list[str]) -> None:
    done = run_check(tmp_path, *arguments)
    assert done.returncode == 0
    assert re.findall("^ran: (.*)$", done.stdout, re.MULTILINE) == expected


def test_check_one_tool_fails_others_still_run(tmp_path: Path) -> None:
    done = run_check(tmp_path, failing="ruff")
    assert done.returncode == 1
    assert done.stdout.count("ran: ") == 4
    assert len(re.findall(r"exit 3 +\d+ s$", done.stdout, re.MULTILINE)) == 2


def test_check_unknown_option_prints_usage(tmp_path: Path) -> None:
    done = run_check(tmp_path, "--everything")
    assert (done.returncode, done.stdout) == (2, "")
    assert "scripts/check --static" in done.stderr


# Files


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md", "LICENSE"),
        *("constraints.txt", "pyproject.toml", "mkdocs.yml", ".github/workflows/ci.yml"),
    ],
)
def test_repo_file_exists_and_is_not_empty(name: str) -> None:
    assert len((ROOT / name).read_text()) > 100


def test_licence_is_mit() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n\nCopyright (c) 2026 The KempnerForge authors\n")
    assert 'license = "MIT"' in (ROOT / "pyproject.toml").read_text()


# In this form the pattern does not find itself.
MACHINE_PATH = re.compile(rb"(?<![\w.\-/}$~])/(?:work|root|Users|tmp/kf)/")


def test_tracked_files_name_no_machine_paths() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.decode(errors='replace').strip()}"
        for path in tracked_files()
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_machine_paths_check_finds_each_kind() -> None:
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


def test_package_swallows_no_error() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in swallowed_errors(ast.parse(path.read_text()))
    ]
    assert found == []


def test_package_public_names_have_docstrings() -> None:
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
def test_swallowed_error_check_finds_each_kind(code: str, lines: list[int]) -> None:
    assert list(swallowed_errors(ast.parse(code))) == lines


def test_docstring_check_finds_missing_ones() -> None:
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
