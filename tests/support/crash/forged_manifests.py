"""Forged manifests: something is wrong, but all digests are valid because the forger computed them again.

xxh3 uses no secret, so digests cannot detect this. Readers must check the content instead of
trusting it.
"""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from support.crash.mutations import (
    JUNK_JSON,
    Changes,
    Mutation,
    Subject,
    flip_bits,
    manifest_of,
    resigned,
    shards,
    signed,
)

from kempnerforge.checkpoint.format import paths

ODD_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 4.0, -0.0),
    *(
        float("nan"),
        float("inf"),
        "",
        "1",
        "x" * 10_000,
        "../x",
        [],
        [1],
        [[]],
        {},
        {"a": 1},
        {"": {}},
        [None],
    ),
]
ODD_NAMES = [
    *("../outside/secret", "/etc/passwd", "..", ".", "", "a/b", "./index.bin", "x\0y", "x" * 300, "\ud800"),
    *("step/../../x", "//x", "\n", "manifest.json"),
]


def _resigned_manifest(what: str, body: dict[str, Any], *, may_load: bool = False) -> Mutation:
    try:
        data = signed(body)
    except (ValueError, UnicodeError):  # an integer or a text that JSON cannot represent
        data = b'{"digest": "0"}'
    return Mutation(f"signed manifest, {what}", {paths.MANIFEST: data}, may_load=may_load)


def signed_field(subject: Subject, rng: random.Random) -> Mutation:
    body = manifest_of(subject.files)
    name = rng.choice(sorted(body.keys() - {"digest"}))
    if rng.random() < 0.2:
        del body[name]
        return _resigned_manifest(f"without {name}", body, may_load=True)
    body[name] = rng.choice(ODD_VALUES)
    # Fields about the run are only reported. Fields about files and the step are checked.
    reported = (
        name not in ("files", "step", "format", "block_bytes")
        or body[name] == manifest_of(subject.files)[name]
    )
    return _resigned_manifest(f"{name} = {str(body[name])[:40]}", body, may_load=reported)


def signed_record(subject: Subject, rng: random.Random) -> Mutation:
    body = manifest_of(subject.files)
    name = rng.choice(sorted(body["files"]))
    record, value = body["files"][name], rng.choice(ODD_VALUES)
    before = json.dumps(record)
    how = rng.randrange(6)
    if how == 0:
        record["size_bytes"] = value
    elif how == 1:
        record["xxh3_128"] = value
    elif how == 2:
        record["xxh3_128"] = [value] * rng.choice([1, 1, 3])
    elif how == 3:
        body["files"][name] = value
    elif how == 4:
        record["size_bytes"] += rng.choice([-1, 1, 16 << 20, 2**40])
    else:
        record["xxh3_128"] = record["xxh3_128"] * 2
    same = json.dumps(body["files"][name]) == before
    return _resigned_manifest(f"record of {name} {how} {str(value)[:30]}", body, may_load=same)


def signed_names(subject: Subject, rng: random.Random) -> Mutation:
    body = manifest_of(subject.files)
    name, odd = rng.choice(sorted(body["files"])), rng.choice(ODD_NAMES)
    if rng.random() < 0.5:
        body["files"][odd] = body["files"].pop(name)
    else:
        body["files"][odd] = {"size_bytes": 6, "xxh3_128": ["00"]}
    return _resigned_manifest(f"names {odd[:20]!r}", body)


def signed_without(subject: Subject, rng: random.Random) -> Mutation:
    body = manifest_of(subject.files)
    name = rng.choice(sorted(body["files"]))
    del body["files"][name]
    return _resigned_manifest(f"does not list {name}", body, may_load=name == paths.CONFIG)


def signed_train_state(subject: Subject, rng: random.Random) -> Mutation:
    """Change state that is not a tensor, with valid digests. It may load or not, but must never crash."""
    body = json.loads(subject.files[paths.TRAIN_STATE])
    if rng.random() < 0.4:
        data = rng.choice(JUNK_JSON)(rng)
    else:
        name = rng.choice(sorted(body))
        body[name] = rng.choice([*ODD_VALUES, {"__tuple__": 3}, {"__bytes__": "é"}, {"__set__": [[1]]}])
        if rng.random() < 0.3:
            del body[name]
        try:
            data = json.dumps(body).encode()
        except ValueError:
            data = b"{}"
    changes = resigned(subject.files, paths.TRAIN_STATE, data)
    return Mutation("signed train state", changes, may_load=True, objects_too=False)


def signed_config(subject: Subject, rng: random.Random) -> Mutation:
    data = rng.choice([b"\xff\xfe", b"[a", b"a = 1\na = 2", b"", rng.randbytes(50), b"a = {" * 3000])
    return Mutation("signed config", resigned(subject.files, paths.CONFIG, data), may_load=True)


def signed_index(subject: Subject, rng: random.Random) -> Mutation:
    data = flip_bits(subject.files[paths.INDEX], rng, rng.choice([1, 1, 2, 8]))
    return Mutation("signed index, bits", resigned(subject.files, paths.INDEX, data), may_load=True)


def signed_index_counts(subject: Subject, rng: random.Random) -> Mutation:
    """Write impossible counts, offsets or lengths."""
    data = bytearray(subject.files[paths.INDEX])
    value = rng.choice(
        [0, 1, 2**16, 2**31, 2**32 - 1, 2**48, 2**62, 2**63, 2**64 - 1, len(data), 8 * len(data)]
    )
    if rng.random() < 0.5:
        at = rng.choice([8, 16, 24])
        before = data[at : at + 8]
        struct.pack_into("<Q", data, at, value)
        same = data[at : at + 8] == before
    else:
        (table,) = struct.unpack_from("<Q", data, 16)
        at = rng.randrange(32, table - 8)
        before = data[at : at + 8]
        struct.pack_into("<Q", data, at, value)
        same = data[at : at + 8] == before
    what = f"signed index, {value} at {at}"
    return Mutation(what, resigned(subject.files, paths.INDEX, bytes(data)), may_load=same or at >= 32)


def signed_index_files(subject: Subject, rng: random.Random) -> Mutation:
    data = subject.files[paths.INDEX]
    (files_at,) = struct.unpack_from("<Q", data, 24)
    names = json.loads(data[files_at:])
    odd: list[Any] = [
        [name.replace("shard", "../outside/shard") for name in names],
        [f"/{name}" for name in names],
        names[::-1] if len(names) > 1 else [],
        [paths.INDEX] * len(names),
        [paths.MANIFEST] * len(names),
        [],
        {},
        None,
        5,
        [[name] for name in names],
        [None] * len(names),
    ]
    changed = data[:files_at] + json.dumps(rng.choice(odd)).encode()
    return Mutation("signed index, file names", resigned(subject.files, paths.INDEX, changed))


def signed_shard_header(subject: Subject, rng: random.Random) -> Mutation:
    name = rng.choice(shards(subject.files))
    data = bytearray(subject.files[name])
    (length,) = struct.unpack_from("<Q", data)
    if rng.random() < 0.5:
        struct.pack_into("<Q", data, 0, rng.choice([0, 1, length + 1, 2**31, 2**63, 2**64 - 1]))
    else:
        data[8 : 8 + length] = rng.choice(
            [bytes(length), b"{" * length, flip_bits(bytes(data[8 : 8 + length]), rng, 3)]
        )
    return Mutation("signed shard header", resigned(subject.files, name, bytes(data)), may_load=True)


def signed_swap(subject: Subject, rng: random.Random) -> Mutation:
    """Swap two shards, with a manifest that agrees."""
    one, other = rng.sample(shards(subject.files), 2)
    body = manifest_of(subject.files)
    body["files"][one], body["files"][other] = body["files"][other], body["files"][one]
    changes: Changes = {one: subject.files[other], other: subject.files[one], paths.MANIFEST: signed(body)}
    return Mutation("signed swap of shards", changes)
