"""New files and folders take the group permissions of the folder that they are made in."""

from __future__ import annotations

import ast
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import Launcher, make_run

from kempnerforge import fsio
from kempnerforge.checkpoint.retention import read_locks

pytest_plugins = ["support.run_fixtures"]

ROOT = Path(__file__).parents[2]
OTHER_GROUP = 43210
"""Of nobody here; only root can give a folder to it."""
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to any group")


@pytest.fixture(autouse=True)
def careful_umask() -> Iterator[None]:
    """The strictest mask that users have."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def made_below(folder: Path) -> dict[str, str]:
    """Kind, octal mode and group of everything below ``folder``, but for what wandb makes in its folder."""
    return {
        name: f"{'folder' if path.is_dir() else 'file'} {mode(path):o} {path.stat().st_gid}"
        for path in folder.rglob("*")
        if not path.is_symlink() and "/wandb/" not in (name := str(path.relative_to(folder)))
    }


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("umask", "above", "folder_mode", "file_mode"),
    [
        (0o077, 0o770, 0o770, 0o660),
        (0o077, 0o750, 0o750, 0o640),
        (0o077, 0o730, 0o730, 0o620),
        (0o077, 0o700, 0o700, 0o600),
        (0o022, 0o700, 0o705, 0o604),  # what others may is the mask's
        (0o022, 0o775, 0o775, 0o664),
        (0o000, 0o755, 0o757, 0o646),
    ],
)
def test_new_files_group_permissions_match_folder(
    tmp_path: Path, umask: int, above: int, folder_mode: int, file_mode: int
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(above)
    os.umask(umask)
    fsio.make_folder(parent / "a" / "b")
    fsio.write_new_file(parent / "a" / "new", b"x")
    fsio.append_line(parent / "a" / "appended", "x")
    fsio.atomic_write(parent / "a" / "replaced", b"x")
    assert [mode(parent / "a"), mode(parent / "a" / "b")] == [folder_mode] * 2
    assert {mode(parent / "a" / name) for name in ("new", "appended", "replaced")} == {file_mode}


@pytest.mark.smoke
def test_existing_file_keeps_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    (tmp_path / "old").touch(0o604)
    fsio.append_line(tmp_path / "old", "x")
    assert mode(tmp_path / "old") == 0o600
    with pytest.raises(FileExistsError):
        fsio.open_file(tmp_path / "old", os.O_WRONLY | os.O_EXCL)


@pytest.mark.smoke
@AS_ROOT
def test_new_files_other_group_bits_not_given_to_own_group(tmp_path: Path) -> None:
    """Permissions meant for another group are not given to the process's own."""
    os.chown(tmp_path, -1, OTHER_GROUP)
    tmp_path.chmod(0o770)  # not setgid: what is made here has the process's group
    fsio.write_new_file(tmp_path / "file", b"x")
    fsio.make_folder(tmp_path / "folder")
    assert mode(tmp_path / "file") == 0o600
    assert mode(tmp_path / "folder") == 0o700


@pytest.mark.smoke
def test_new_files_access_control_list_takes_precedence(tmp_path: Path) -> None:
    # Version 2, then user, group, mask and others: tag, permissions, id.
    entries = [(0x01, 7), (0x04, 5), (0x10, 5), (0x20, 0)]
    acl = b"\x02\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + b"\xff" * 4 for tag, bits in entries
    )
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")
    tmp_path.chmod(0o770)
    fsio.write_new_file(tmp_path / "file", b"x")
    assert mode(tmp_path / "file") == 0o640


@AS_ROOT
def test_run_in_setgid_folder_belongs_to_its_group(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, -1, OTHER_GROUP)
    shared.chmod(0o2770)
    run = make_run(
        tmp_path,
        corpus,
        **{
            "run.dir": str(shared / "runs" / "one"),
            "data.cache_dir": str(shared / "cache"),
            "checkpoint.async_mode": "async",
            "metrics.enable_wandb": True,
            "train.max_steps": 8,
        },
    )
    ended = launcher.run(run, ranks=2, faults=[("set_umask", {"mask": 0o077})])
    assert ended.statuses == [0, 0], ended.output
    kempnerforge = [sys.executable, "-c", "from kempnerforge.cli.app import main; main()", "ckpt"]
    subprocess.run([*kempnerforge, "pin", run.folder, "4"], check=True, capture_output=True)
    subprocess.run(
        [*kempnerforge, "fork", run.step_folder(4), shared / "runs" / "two"], check=True, capture_output=True
    )
    with read_locks.lock_for_reading(run.step_folder(8), what="a test"):
        found = made_below(shared)
    names = {re.sub(r"[0-9a-f]{16}", "*", name) for name in found}
    checkpoints = "runs/one/checkpoints"
    assert names >= {
        *(f"runs/one/{name}" for name in ("run.json", "metrics.jsonl", "receipts.jsonl", "lease.1.json")),
        *(f"{checkpoints}/{name}" for name in ("pins/step_00000004", "holds/step_00000008.*.json")),
        f"{checkpoints}/step_00000004/manifest.json",
        f"{checkpoints}/step_00000004/shard_00001_of_00002.safetensors",
        "runs/one/wandb",
        "runs/two/checkpoints/step_00000004/manifest.json",
    }
    assert any(name.startswith("cache/") and name.endswith("train_00000.bin") for name in names)
    wanted = {f"folder 2770 {OTHER_GROUP}", f"file 660 {OTHER_GROUP}"}
    assert {name: one for name, one in found.items() if one not in wanted} == {}


def makers(tree: ast.AST) -> Iterator[int]:
    """Lines that make a file or a folder."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "O_CREAT":
            yield node.lineno
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        given = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        to_write = name == "open" and any(re.match("[wax]", str(value)) for value in given)
        if to_write or name in ("mkdir", "makedirs", "touch", "write_text", "write_bytes"):
            yield node.lineno


@pytest.mark.smoke
def test_fsio_is_only_maker_of_files_and_folders() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "kempnerforge").rglob("*.py"))
        if path.name != "fsio.py"
        for line in makers(ast.parse(path.read_text()))
    ]
    assert found == [], "use kempnerforge.fsio, which gives new files the group permissions of their folder"


@pytest.mark.smoke
def test_makers_check_finds_every_kind() -> None:
    code = 'os.open(p, os.O_CREAT)\np.mkdir()\np.open("w")\nopen(p, "ab")\nopen(p)\nopen(p, "rb")\np.touch()'
    assert sorted(makers(ast.parse(code))) == [1, 2, 3, 4, 7]
