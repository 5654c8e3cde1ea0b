"""All kinds of mutations, and their weights."""

from __future__ import annotations

import random

from support.crash import forged_manifests, mutations
from support.crash.mutations import Maker, Mutation, Subject

MAKERS: list[tuple[Maker, int]] = [
    (mutations.bit_flips, 24),
    (mutations.overwritten, 10),
    (mutations.truncated, 10),
    (mutations.extended, 6),
    (mutations.moved_inside, 3),
    (mutations.swapped, 8),
    (mutations.copied_over, 5),
    (mutations.missing, 4),
    (mutations.stale, 8),
    (mutations.stale_but_renumbered, 2),
    (mutations.wrong_json, 6),
    (forged_manifests.signed_field, 8),
    (forged_manifests.signed_record, 8),
    (forged_manifests.signed_names, 6),
    (forged_manifests.signed_without, 2),
    (forged_manifests.signed_train_state, 6),
    (forged_manifests.signed_config, 2),
    (forged_manifests.signed_index, 8),
    (forged_manifests.signed_index_counts, 8),
    (forged_manifests.signed_index_files, 4),
    (forged_manifests.signed_shard_header, 2),
    (forged_manifests.signed_swap, 2),
    (mutations.links, 8),
    (mutations.no_file, 3),
    (mutations.huge_file, 3),
    (mutations.strangers, 1),
]
"""(maker, weight) of each kind."""


def draw(subject: Subject, rng: random.Random) -> tuple[str, Mutation]:
    """Return a random mutation and the name of its kind."""
    makers, weights = zip(*MAKERS, strict=True)
    maker = rng.choices(makers, weights)[0]
    return maker.__name__, maker(subject, rng)
