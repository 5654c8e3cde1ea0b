"""Ways to damage a committed checkpoint. Each changes some files of its folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.checksums import record_of

Files = dict[str, bytes]
"""Name -> content of every file of a step."""


@dataclass(frozen=True)
class Special:
    """A special file: ``link`` (to ``target``), ``folder``, ``fifo``, or ``sparse`` (of ``size_bytes``)."""

    kind: str
    target: str = ""
    size_bytes: int = 0


Changes = dict[str, bytes | Special | None]
"""Name -> new content; None for a removed file."""


@dataclass(frozen=True)
class Mutation:
    """One way in which a checkpoint differs from what was committed."""

    label: str
    changes: Changes
    may_load: bool = False
    """Whether digests cannot detect it, because all were computed again. The tensors must still be right."""
    objects_too: bool = True
    """Whether, if it loads, state that is not a tensor must be as it was saved."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint to mutate."""

    files: Files
    older: Files
    """The step before it in the same run."""
    outside: Path
    """A folder with copies of all files, from which no load may read."""


Maker = Callable[[Subject, random.Random], Mutation]


def _digest(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def signed(body: dict[str, Any]) -> bytes:
    """Return a manifest whose own digest is valid."""
    body = {name: value for name, value in body.items() if name != "digest"}
    return json.dumps({**body, "digest": _digest(body)}).encode()


def manifest_of(files: Files) -> dict[str, Any]:
    """Return the manifest as JSON."""
    return json.loads(files[paths.MANIFEST])


def resigned(files: Files, name: str, data: bytes) -> Changes:
    """Return changes that replace one file and make the manifest agree with it."""
    body, record = manifest_of(files), record_of(data)
    body["files"][name] = {"size_bytes": record.size_bytes, "xxh3_128": record.xxh3_128}
    return {name: data, paths.MANIFEST: signed(body)}


def shards(files: Files) -> list[str]:
    """Return the names of the tensor files."""
    return sorted(name for name in files if name.endswith(paths.SHARD_SUFFIX))


def flip_bits(data: bytes, rng: random.Random, count: int) -> bytes:
    """Return ``data`` with ``count`` different bits flipped."""
    changed = bytearray(data)
    for bit in rng.sample(range(8 * len(data)), min(count, 8 * len(data))):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# -- damage that digests detect --------------------------------------------------------------------


def bit_flips(subject: Subject, rng: random.Random) -> Mutation:
    name = rng.choice(sorted(subject.files))
    data = flip_bits(subject.files[name], rng, rng.choice([1, 1, 1, 2, 3, 16]))
    return Mutation(f"bits of {name}", {name: data})


def overwritten(subject: Subject, rng: random.Random) -> Mutation:
    name = rng.choice(sorted(subject.files))
    data = subject.files[name]
    begin = rng.randrange(len(data))
    size = min(rng.choice([1, 8, 512, 4096, len(data)]), len(data) - begin)
    fill = rng.choice([bytes(size), rng.randbytes(size), b" " * size])
    if fill == data[begin : begin + size]:
        fill = flip_bits(fill, rng, 1)
    return Mutation(f"bytes of {name}", {name: data[:begin] + fill + data[begin + size :]})


def truncated(subject: Subject, rng: random.Random) -> Mutation:
    name = rng.choice(sorted(subject.files))
    size = rng.choice([0, 1, len(subject.files[name]) - 1, rng.randrange(len(subject.files[name]))])
    return Mutation(f"{name} cut short", {name: subject.files[name][:size]})


def extended(subject: Subject, rng: random.Random) -> Mutation:
    name = rng.choice(sorted(subject.files))
    size = rng.choice([1, 7, 4096])
    # White space after a manifest does not change its content.
    more = rng.choice([bytes(size), rng.randbytes(size), subject.files[name]])
    return Mutation(f"{name} made longer", {name: subject.files[name] + more + b"\0"})


def moved_inside(subject: Subject, rng: random.Random) -> Mutation:
    name = rng.choice(sorted(subject.files))
    data, shift = subject.files[name], rng.choice([1, 4, 8, 4096])
    rotated = data[shift:] + data[:shift]
    if rotated == data:
        rotated = flip_bits(data, rng, 1)
    return Mutation(f"{name} shifted", {name: rotated})


def _two(subject: Subject, rng: random.Random) -> list[str]:
    return rng.sample(shards(subject.files) if rng.random() < 0.5 else sorted(subject.files), 2)


def swapped(subject: Subject, rng: random.Random) -> Mutation:
    one, other = (
        rng.sample(shards(subject.files), 2) if rng.random() < 0.6 else rng.sample(sorted(subject.files), 2)
    )
    return Mutation(f"{one} and {other} swapped", {one: subject.files[other], other: subject.files[one]})


def copied_over(subject: Subject, rng: random.Random) -> Mutation:
    one, other = (
        rng.sample(shards(subject.files), 2) if rng.random() < 0.5 else rng.sample(sorted(subject.files), 2)
    )
    return Mutation(f"{one} over {other}", {other: subject.files[one]})


def missing(subject: Subject, rng: random.Random) -> Mutation:
    names = rng.sample(sorted(subject.files), rng.choice([1, 1, 2]))
    return Mutation(f"{names} missing", dict.fromkeys(names))


def stale(subject: Subject, rng: random.Random) -> Mutation:
    differing = [name for name in sorted(subject.files) if subject.files[name] != subject.older[name]]
    names = (
        [paths.MANIFEST] if rng.random() < 0.4 else rng.sample(differing, rng.randint(1, len(differing) - 1))
    )
    changes: Changes = {name: subject.older[name] for name in names}
    return Mutation(f"{names} of the step before", changes)


def stale_but_renumbered(subject: Subject, rng: random.Random) -> Mutation:
    """Replace the manifest by that of the step before, with this step's number and a valid digest."""
    body = {**manifest_of(subject.older), "step": manifest_of(subject.files)["step"]}
    if rng.random() < 0.5:
        body["files"][paths.TRAIN_STATE] = manifest_of(subject.files)["files"][paths.TRAIN_STATE]
    return Mutation("older manifest renumbered", {paths.MANIFEST: signed(body)})


JUNK_JSON: list[Callable[[random.Random], bytes]] = [
    lambda rng: b"",
    lambda rng: b"null",
    lambda rng: b"[]",
    lambda rng: b"{}",
    lambda rng: b'"text"',
    lambda rng: b"1e999",
    lambda rng: b"NaN",
    lambda rng: b'{"digest": 1}',
    lambda rng: b'{"digest": "00"}',
    lambda rng: b"[" * rng.choice([10, 5_000, 500_000]),
    lambda rng: b'{"a":' * rng.choice([10, 5_000, 200_000]),
    lambda rng: b"9" * rng.choice([100, 5_000, 100_000]),
    lambda rng: b"\xff\xfe" + rng.randbytes(40),
    lambda rng: b"\xef\xbb\xbf{}",
    lambda rng: rng.randbytes(300),
    lambda rng: b'{"files": {"a": 1, "a": 2}}',
    lambda rng: b"\0" * 4096,
]


def wrong_json(subject: Subject, rng: random.Random) -> Mutation:
    name = rng.choice([paths.MANIFEST, paths.MANIFEST, paths.TRAIN_STATE])
    return Mutation(f"{name} is other JSON", {name: rng.choice(JUNK_JSON)(rng)})


# -- entries that are not regular files ------------------------------------------------------------


def links(subject: Subject, rng: random.Random) -> Mutation:
    name = rng.choice(sorted(subject.files))
    copy = str(subject.outside / name)
    size = len(subject.files[name])
    # The size of a link is the length of its target. Padding makes it the size that the manifest
    # lists.
    padded = copy.replace("/", "/" + "./" * ((size - len(copy)) // 2), 1)
    padded = padded + "/" * (size - len(padded)) if len(padded) < size else padded
    fitting = [padded.replace("//", "/./", 1)] if len(padded) <= 4000 else []
    target = rng.choice(
        [copy, "/etc/hostname", "/dev/zero", name, "nowhere", "../step_00000003/" + name, *fitting * 4]
    )
    return Mutation(f"{name} is a link to {target[-30:]}", {name: Special("link", target)})


def no_file(subject: Subject, rng: random.Random) -> Mutation:
    name, kind = rng.choice(sorted(subject.files)), rng.choice(["folder", "fifo"])
    return Mutation(f"{name} is a {kind}", {name: Special(kind)})


def huge_file(subject: Subject, rng: random.Random) -> Mutation:
    name = rng.choice(sorted(subject.files))
    size = rng.choice([1 << 30, 1 << 40, 8 << 40])
    if rng.random() < 0.5 or name == paths.MANIFEST:
        return Mutation(f"{name} is huge", {name: Special("sparse", size_bytes=size)})
    body = manifest_of(subject.files)
    body["files"][name]["size_bytes"] = size
    body["files"][name]["xxh3_128"] = rng.choice(
        [body["files"][name]["xxh3_128"], ["00"] * min(size >> 24, 70_000)]
    )
    changes: Changes = {name: Special("sparse", size_bytes=size), paths.MANIFEST: signed(body)}
    return Mutation(f"{name} is huge, signed", changes)


def strangers(subject: Subject, rng: random.Random) -> Mutation:
    name = rng.choice(["notes.txt", "shard_00009_of_00010.safetensors", ".hidden", "step_00000009"])
    return Mutation(f"a stranger, {name}", {name: rng.randbytes(100)}, may_load=True)
