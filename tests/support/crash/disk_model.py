"""A model of the states that a crash may leave on a disk, given all operations and syncs before it.

The model makes only the promises of POSIX:

- Data written to a file is durable after an ``fsync`` or ``fdatasync`` of that file. Before that,
  each write and each change of size may have reached the disk completely, in part (by sectors), as
  zeros, as garbage, or not at all, in any order. The size may change before the bytes.
- A name (created, renamed, unlinked) is durable after an ``fsync`` of its folder. Before that, each
  change of the folder may or may not have reached the disk, in any order. Only changes of one name,
  or of one file or folder, keep their order. A rename happens completely or not at all.
- The sync of a file does not include its name. The sync of a folder does not include its files, its
  subfolders or its own name.

The journals of ext4 and xfs and the synchronous metadata of NFS servers allow only some of these
states.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from support.crash.file_trees import Tree

SECTOR_BYTES = 512
VARIANTS = ("lost", "whole", "zeros", "garbage", "short", "sectors", "size_ahead")
"""What may have become of the writes to a file that was not synced."""


@dataclass(frozen=True)
class Op:
    """One recorded operation."""

    role: str
    op: str
    path: str
    to: str = ""
    size: int = 0
    offset: int = 0
    data: bytes = b""
    done: bool = True
    """False for an operation that the file system refused, such as unlinking a missing file."""


def read_log(path: Path, *, attempts: bool = False) -> list[Op]:
    """Read a recording. With ``attempts``, include the operations that were refused.

    Fails if an unrecorded operation changed the folder.
    """
    ops = []
    for line in path.read_bytes().splitlines():
        entry = json.loads(line)
        assert entry["op"] != "blind", f"not recorded: {entry}"
        entry["data"] = base64.b64decode(entry.get("data", ""))
        ops.append(Op(**entry))
    return [op for op in ops if op.done or attempts]


@dataclass(eq=False)
class File:
    """A file: its durable bytes, and the writes since then in order."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """(offset, data), or (size, None) for a change of size."""

    def content(self, pending: Iterable[tuple[int, bytes | None]]) -> bytes:
        data = bytearray(self.durable)
        for offset, written in pending:
            if written is None:
                data = data[:offset] + bytes(max(0, offset - len(data)))
            else:
                data += bytes(max(0, offset + len(written) - len(data)))
                data[offset : offset + len(written)] = written
        return bytes(data)

    def after_crash(self, variant: str, rng: random.Random) -> bytes:
        """Return the content after a crash."""
        whole = self.content(self.pending)
        if variant == "lost" or not self.pending:
            return self.durable
        if variant == "whole":
            return whole
        if variant == "short":
            return self.content(self.pending[: rng.randrange(len(self.pending))])
        if variant == "size_ahead":
            return self.durable + bytes(max(0, len(whole) - len(self.durable)))
        if variant == "zeros":
            return bytes(len(whole))
        changed = bytearray(whole)
        for begin in range(0, len(whole), SECTOR_BYTES):
            if variant == "garbage" or rng.random() < 0.5:
                size = min(SECTOR_BYTES, len(whole) - begin)
                old = self.durable[begin : begin + size].ljust(size, b"\0")
                changed[begin : begin + size] = rng.randbytes(size) if variant == "garbage" else old
        return bytes(changed)


@dataclass(eq=False)
class Link:
    """A symbolic link, which is created atomically."""

    target: str


@dataclass(eq=False)
class Change:
    """One change of a folder: each changed name and its new entry, None for a removed one."""

    names: dict[str, Union[File, Folder, Link, None]]  # noqa: UP007 - Folder is defined below
    nodes: tuple[Any, ...]
    """The file, folder or link that the change affects."""


@dataclass(eq=False)
class Folder:
    """A folder: its durable names, and the changes since then in order."""

    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    now: dict[str, Any] = field(default_factory=dict)

    def change(self, names: dict[str, Any]) -> None:
        nodes = tuple(
            node for name in names for node in (self.now.get(name), names[name]) if node is not None
        )
        self.pending.append(Change(names, nodes))
        _apply(self.now, names)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.now), []

    def depends(self, later: int, earlier: int) -> bool:
        """Return whether a pending change can only be on the disk if an earlier one is."""
        one, other = self.pending[later], self.pending[earlier]
        return bool(one.names.keys() & other.names.keys()) or any(
            mine is theirs for mine in one.nodes for theirs in other.nodes
        )

    def after_crash(self, kept: frozenset[int]) -> dict[str, Any]:
        names = dict(self.durable)
        for number in sorted(kept):
            _apply(names, self.pending[number].names)
        return names


def _apply(names: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, node in changes.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """A folder to which operations are applied, and the states that a crash could leave of it."""

    def __init__(self, tree: Tree | None = None) -> None:
        self.root = Folder()
        for path, content in sorted((tree or {}).items()):
            made = File(content) if isinstance(content, bytes) else Link(content) if content else Folder()
            parent, name = self._parent(path)
            parent.now[name] = parent.durable[name] = made

    def apply(self, op: Op) -> None:
        """Apply one recorded operation."""
        if op.op in ("write", "pwrite", "truncate", "fsync"):
            self._on_node(op)
            return
        parent, name = self._parent(op.path)
        if op.op == "create":
            parent.change({name: File()})
        elif op.op == "mkdir":
            parent.change({name: Folder()})
        elif op.op == "symlink":
            parent.change({name: Link(op.to)})
        elif op.op in ("unlink", "rmdir"):
            assert op.op == "unlink" or not parent.now[name].now, f"{op.path} is not empty"
            assert name in parent.now, op.path
            parent.change({name: None})
        elif op.op in ("rename", "link"):
            other, new_name = self._parent(op.to)
            assert other is parent or op.op == "link", f"{op}: a rename changes one folder here"
            gone = {name: None} if op.op == "rename" else {}
            other.change({**gone, new_name: parent.now[name]})
        else:
            raise AssertionError(f"unknown operation {op.op}")

    def _on_node(self, op: Op) -> None:
        node = self._find(op.path)
        if op.op == "fsync" and isinstance(node, Folder):
            node.sync()
        elif op.op == "fsync":
            node.durable, node.pending = node.content(node.pending), []
        else:
            node.pending.append((op.size, None) if op.op == "truncate" else (op.offset, op.data))

    def _find(self, path: str) -> Any:
        node: Any = self.root
        for part in Path(path).parts:
            node = node.now[part]
        return node

    def _parent(self, path: str) -> tuple[Folder, str]:
        return self._find(str(Path(path).parent)), Path(path).name

    def now(self) -> Tree:
        """Return the tree as processes see it."""
        return _tree(self.root, lambda folder: folder.now, lambda file: file.content(file.pending))

    def units(self) -> list[Unit]:
        """Return the changes that a crash can keep or lose, one by one."""
        found: list[Unit] = []
        for node in self._reachable():
            if isinstance(node, Folder):
                found += [Unit(node, number) for number in range(len(node.pending))]
            elif isinstance(node, File) and node.pending:
                found.append(Unit(node, 0))
        return found

    def _reachable(self) -> list[Any]:
        seen: list[Any] = [self.root]
        for node in seen:
            if isinstance(node, Folder):
                changed = (new for change in node.pending for new in change.names.values())
                for child in itertools.chain(node.durable.values(), changed):
                    if child is not None and not any(child is one for one in seen):
                        seen.append(child)
        return seen

    def crash(self, choice: Choice, rng: random.Random) -> Tree:
        """Return the tree that a crash leaves if it keeps and loses the changes of ``choice``."""

        def names(folder: Folder) -> dict[str, Any]:
            return folder.after_crash(choice.kept.get(folder, frozenset()))

        return _tree(self.root, names, lambda file: file.after_crash(choice.variants.get(file, "whole"), rng))


@dataclass(frozen=True)
class Unit:
    """One unsynced change of a folder, or all unsynced writes to a file."""

    node: Any
    number: int

    @property
    def is_name(self) -> bool:
        """Whether it is a change of a folder."""
        return isinstance(self.node, Folder)


@dataclass
class Choice:
    """The outcome of a crash: for each folder the changes that are kept, for each file what became of it."""

    kept: dict[Any, frozenset[int]] = field(default_factory=dict)
    variants: dict[Any, str] = field(default_factory=dict)


def _tree(root: Folder, names: Any, content: Any) -> Tree:
    found: Tree = {}

    def walk(folder: Folder, prefix: str) -> None:
        for name, node in names(folder).items():
            if isinstance(node, Folder):
                found[prefix + name] = None
                walk(node, f"{prefix}{name}/")
            else:
                found[prefix + name] = node.target if isinstance(node, Link) else content(node)

    walk(root, "")
    return found
