"""Mixtures: exact proportions at every place, one order whatever the ranks, and weights that may change."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from kempnerforge.config.data_sources import PARTS, normalized
from kempnerforge.config.schema import JobConfig, load_job
from kempnerforge.data import mixture_schedule
from kempnerforge.data.fingerprint import compare_data, fingerprint
from kempnerforge.data.loader import Batch, BatchLoader, Cursor, batch_ids
from kempnerforge.data.mixture import MixtureDataset, MixtureOrder, MixtureSamples, Phase, source_seed
from kempnerforge.data.mixture_schedule import Schedule
from kempnerforge.data.rows import Rows
from kempnerforge.data.sample_order import sample_ids
from kempnerforge.data.tokens import TokenDataset, open_dataset
from kempnerforge.errors import ConfigError, DataError
from kempnerforge.train.evaluation import validation_losses
from kempnerforge.train.mixture_run import end_with_data
from kempnerforge.train.run_length import run_length

SEQ_LEN = 4
WEIGHTS = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any)


def reference(phases: list[Phase], sizes: list[int], num_positions: int) -> list[tuple[int, int]]:
    """Walk the order position by position: the source at each, and how often it was drawn before.

    Of the turns that may begin, the one with the earliest deadline is next, in exact arithmetic.
    """
    drawn = [0] * len(sizes)
    found: list[tuple[int, int]] = []
    for phase, after in itertools.zip_longest(phases, phases[1:]):
        turns = [0] * len(sizes)
        shares = [Fraction(weight, sum(phase.weights)) for weight in phase.weights]
        end = min(after.start, num_positions) if after else num_positions
        for place in range(end - phase.start):
            ready = [i for i, w in enumerate(shares) if w and math.floor(turns[i] / w) <= place]
            source = min(ready, key=lambda i: (math.ceil((turns[i] + 1) / shares[i]), i))
            turns[source] += 1
            found.append((source, drawn[source]))
            drawn[source] += 1
    return found


@st.composite
def orders(draw: st.DrawFn) -> MixtureOrder:
    num_sources = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 30), min_size=num_sources, max_size=num_sources))
    starts = sorted(draw(st.sets(st.integers(1, 300), max_size=4)))
    weights = st.lists(st.integers(0, 25), min_size=num_sources, max_size=num_sources).filter(any)
    phases = [Phase(start, start, tuple(draw(weights))) for start in (0, *starts)]
    return MixtureOrder({f"s{i}": size for i, size in enumerate(sizes)}, phases, draw(st.integers(0, 9)))


@given(WEIGHTS, st.none() | st.integers(1, 200))
@settings(max_examples=30)
def test_schedule_within_one_of_ideal_at_every_place(weights: list[int], length: int | None) -> None:
    schedule = Schedule(tuple(weights), length)
    positions = np.arange(min(length or 300, 300))
    sources, turns = schedule.turns_at(positions)
    counts = [0] * len(weights)
    for place, (source, turn) in enumerate(zip(sources, turns, strict=True), 1):
        assert turn == counts[source]
        counts[source] += 1
        assert all(
            abs(n - Fraction(place * w, sum(weights))) < 1 for n, w in zip(counts, weights, strict=True)
        )
        if length is None or place < length:
            assert schedule.counts(place).tolist() == counts


@pytest.mark.parametrize(
    "weights",
    [(1, PARTS - 1), (1, 0, 1, PARTS - 2), (333_334, 333_333, 333_333), (123_457, 376_543, 500_000)],
)
def test_schedule_of_a_million_is_within_one(weights: tuple[int, ...]) -> None:
    sources, _ = Schedule(weights, None).turns_at(np.arange(PARTS))
    places = np.arange(1, PARTS + 1)
    for source, weight in enumerate(weights):
        assert np.abs(np.cumsum(sources == source) * PARTS - places * weight).max() < PARTS


@given(orders())
@settings(max_examples=30)
def test_order_equals_walk_with_exact_arithmetic(order: MixtureOrder) -> None:
    expected = reference(list(order.phases), list(order.sizes), 250)
    sources, draws = order.draws_at(np.arange(250))
    assert list(zip(sources.tolist(), draws.tolist(), strict=True)) == expected
    for cursor in (0, 1, 123, 200, 249):
        counts = Counter(source for source, _ in expected[:cursor])
        assert order.epochs(cursor) == {
            name: counts[i] / order.sizes[i] for i, name in enumerate(order.names)
        }


@given(orders(), st.lists(st.integers(0, 10**12), min_size=1, max_size=8))
@settings(max_examples=30)
def test_order_seek_equals_any_other_seek(order: MixtureOrder, positions: list[int]) -> None:
    at_once = order.ids_at(np.array(positions))
    assert at_once.tolist() == [int(order.ids_at(np.array([position]))[0]) for position in positions]
    assert all(0 <= sample < sum(order.sizes) for sample in at_once)
    sources, draws = order.draws_at(np.array(positions))
    for position, source, draw in zip(positions, sources.tolist(), draws.tolist(), strict=True):
        assert order.position_of(source, draw) == position


@given(orders())
@settings(max_examples=30)
def test_order_every_epoch_of_a_source_is_a_permutation(order: MixtureOrder) -> None:
    ids = order.ids_at(np.arange(600))
    sources, samples = order.sources_of(ids), order.samples_of(ids)
    for source, size in enumerate(order.sizes):
        drawn = samples[sources == source]
        for epoch in np.split(drawn[: drawn.size // size * size], drawn.size // size or 1):
            assert not epoch.size or sorted(epoch.tolist()) == list(range(size))


def test_order_of_many_phases_computes_their_schedules_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []

    class Counted(Schedule):
        def __init__(self, weights: tuple[int, ...], length: int | None) -> None:
            made.append(weights)
            super().__init__(weights, length)

    monkeypatch.setattr(mixture_schedule, "Schedule", Counted)
    phases = [Phase(50 * i, 50 * i, (1009 + i, 7)) for i in range(40)]
    for seed in range(3):
        order = MixtureOrder({"a": 5, "b": 6}, phases, seed)
        sources, draws = order.draws_at(np.array([1999]))
        assert order.position_of(int(sources[0]), int(draws[0])) == 1999
    assert len(made) <= len(phases) + 1, "the last one twice, at most"


def test_source_seeds_differ_by_name_and_seed() -> None:
    assert len({source_seed(seed, name) for seed in (3, 4) for name in ("web", "books")}) == 4


@given(st.dictionaries(st.text("abc", min_size=1), st.floats(0, 1e6), min_size=1, max_size=6))
def test_normalized_weights_sum_to_a_million(weights: dict[str, float]) -> None:
    exact = {name: Fraction(repr(weight)) for name, weight in weights.items()}
    too_small = any(0 < weight * PARTS < sum(exact.values()) for weight in exact.values())
    try:
        parts = normalized(weights)
    except ValueError:
        parts = None
    if parts is None:
        event("refused")
        assert too_small or not any(exact.values())
        return
    assert sum(parts.values()) == PARTS
    total = sum(exact.values())
    assert all(abs(parts[name] - PARTS * weight / total) < 1 for name, weight in exact.items())
    assert parts == normalized(dict(reversed(weights.items())))


def test_normalized_weights_are_the_decimals_written() -> None:
    assert normalized({"a": 0.1, "b": 0.2, "c": 0.7}) == {"a": 100_000, "b": 200_000, "c": 700_000}
    assert normalized({"b": 1, "c": 1, "a": 1}) == {"b": 333_333, "c": 333_333, "a": 333_334}
    assert normalized({"a": 1e-6, "b": 1 - 1e-6}) == {"a": 1, "b": 999_999}
    for weights, problem in (
        ({"a": 0.0}, "all weights are 0"),
        ({"a": 1e-9, "b": 1}, "less than a millionth"),
    ):
        with pytest.raises(ValueError, match=problem):
            normalized(weights)


# -- datasets ----------------------------------------------------------------------------------------------


def source(folder: Path, first: int, num_samples: int) -> TokenDataset:
    """Samples of one source: token ``first + i * SEQ_LEN`` is the first of sample ``i``."""
    folder.mkdir()
    np.save(folder / "tokens.npy", first + np.arange(num_samples * SEQ_LEN + 1))
    return open_dataset(folder, val_fraction=0.0)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, TokenDataset]:
    return {name: source(tmp_path / name, i * 10_000, 20 * (i + 1)) for i, name in enumerate(("web", "code"))}


def mixture(
    sources: dict[str, TokenDataset], *phases: dict[str, int], stops: tuple[str, ...] = (), size: int = 8
) -> MixtureDataset:
    """Phases begin every 10 steps of ``size`` samples."""
    weights = {
        10 * i: {name: given.get(name, 0) * PARTS // sum(given.values()) for name in sources}
        for i, given in enumerate(phases)
    }
    return MixtureDataset(sources, weights, stops=stops, seed=5, global_batch_size=size)


def take(dataset: MixtureDataset, count: int, **options: int | Cursor) -> list[Batch]:
    samples = dataset.split("train", SEQ_LEN)
    settings = {"seed": 5, "global_batch_size": 8, "batch_size": 1, **options}
    with BatchLoader(samples, **settings) as loader:  # pyright: ignore[reportArgumentType]
        batches = [batch for batch, _ in islice(loader, count)]
    assert all(isinstance(batch, Batch) for batch in batches)
    return batches  # pyright: ignore[reportReturnType]


def test_loader_gives_the_same_samples_on_any_ranks(sources: dict[str, TokenDataset]) -> None:
    dataset = mixture(sources, {"web": 3, "code": 1}, {"code": 1}, size=12)
    whole = take(dataset, 15, global_batch_size=12)
    for dp_size in (2, 3, 4):
        ranks = [
            take(dataset, 15, global_batch_size=12, dp_size=dp_size, dp_rank=rank) for rank in range(dp_size)
        ]
        for step, batch in enumerate(whole):
            parts = [rank[step] for rank in ranks]
            assert {part.digest for part in parts} == {batch.digest}
            rows = torch.stack([part.inputs_ABT for part in parts], dim=1).flatten(0, 2)
            assert torch.equal(rows, batch.inputs_ABT.flatten(0, 1))
    for step, batch in enumerate(whole):
        first = batch.inputs_ABT[..., 0]
        assert batch.sources_AB is not None
        assert torch.equal(batch.sources_AB, (first < 10_000).long()), "code is 0, web is 1"
        assert int(batch.sources_AB.sum()) == (9 if step < 10 else 0)
    resumed = take(dataset, 1, global_batch_size=12, cursor=Cursor(12 * 12))[0]
    assert torch.equal(resumed.inputs_ABT, whole[12].inputs_ABT)


def test_source_order_does_not_depend_on_others(tmp_path: Path, sources: dict[str, TokenDataset]) -> None:
    """Neither a third source nor the order of the list changes what is drawn before it has a weight."""
    two = mixture(sources, {"web": 3, "code": 1})
    more = {"books": source(tmp_path / "books", 50_000, 7), **dict(reversed(sources.items()))}
    three = mixture(more, {"web": 3, "code": 1}, {"web": 1, "books": 1})
    before, after = take(two, 12), take(three, 12)
    for step, (one, other) in enumerate(zip(before, after, strict=True)):
        assert (one.digest == other.digest) == (step < 10)
        assert torch.equal(one.inputs_ABT, other.inputs_ABT) == (step < 10)
    web = sample_ids(source_seed(5, "web"), np.arange(6), 20)
    drawn = before[0].inputs_ABT[..., 0].flatten()
    assert (drawn[drawn < 10_000] // SEQ_LEN).tolist() == web.tolist()


def test_digest_tells_equal_numbers_of_two_sources_apart(sources: dict[str, TokenDataset]) -> None:
    order = mixture(sources, {"web": 1, "code": 1}).split("train", SEQ_LEN).order
    assert order.names == ("code", "web")
    assert order.digest(np.array([3])) != order.digest(np.array([43]))
    assert order.samples_of(np.array([3, 43])).tolist() == [3, 3]


def test_used_up_source_ends_the_data_where_it_would_repeat(sources: dict[str, TokenDataset]) -> None:
    phases = [{"web": 1, "code": 7}, {"web": 3, "code": 1}]
    assert mixture(sources, *phases).split("train", SEQ_LEN).end is None
    samples = mixture(sources, *phases, stops=("web",)).split("train", SEQ_LEN)
    assert samples.end is not None
    assert samples.end.name == "web"
    ids = samples.order.ids_at(np.arange(samples.end.position + 1))
    web = ids[samples.order.sources_of(ids) == 1]
    assert len(set(web.tolist())) == 20 == len(web) - 1
    unused = mixture(sources, {"code": 1}, stops=("web",)).split("train", SEQ_LEN)
    assert unused.end is None


def test_rows_of_sources_with_and_without_marks_are_joined(sources: dict[str, TokenDataset]) -> None:
    samples = mixture(sources, {"web": 1, "code": 1}).split("train", SEQ_LEN)
    plain = samples.read(np.array([0, 45]))
    assert plain.counted is None
    assert plain.document_ids is None

    class Marked:
        seq_len = SEQ_LEN

        def read(self, ids: np.ndarray) -> Rows:
            shape = (len(ids), SEQ_LEN)
            return Rows(
                np.ones((len(ids), SEQ_LEN + 1), int), np.zeros(shape, bool), np.ones(shape, np.int32)
            )

    marked: Any = Marked()
    samples = MixtureSamples([sources["code"].split("train", SEQ_LEN), marked], samples.order, [False] * 2)
    rows = samples.read(np.array([45, 0]))
    assert rows.counted is not None
    assert rows.document_ids is not None
    assert rows.counted.tolist() == [[False] * SEQ_LEN, [True] * SEQ_LEN]
    assert rows.document_ids.tolist() == [[1] * SEQ_LEN, [0] * SEQ_LEN]
    assert rows.tokens[1].tolist() == [10_000, 10_001, 10_002, 10_003, 10_004]
    assert samples.read(np.array([0])).counted is not None, "a rank with rows of the other source alone"


# -- fingerprints ------------------------------------------------------------------------------------------


def test_fingerprint_additions_after_the_cursor_are_accepted(
    tmp_path: Path, sources: dict[str, TokenDataset]
) -> None:
    was = fingerprint(mixture(sources, {"web": 3, "code": 1}), "train", SEQ_LEN, 5)
    more = {**sources, "books": source(tmp_path / "books", 50_000, 7)}
    now = fingerprint(mixture(more, {"web": 3, "code": 1}, {"web": 1, "books": 1}), "train", SEQ_LEN, 5)
    assert compare_data(was, was, 80) == ([], [])
    lines = ['new source "books" from step 10 on', "weights: books 50%, web 50% from step 10 on"]
    assert compare_data(was, now, 80) == ([], lines)
    changes, _ = compare_data(was, now, 88)
    assert len(changes) == 1
    assert changes[0].startswith("the weights: were code 25%, web 75% from step 0 on; are code 25%, web 75%")
    dropped, additions = compare_data(now, was, 80)
    assert dropped == []
    assert additions == [
        'source "books", of which no sample has been drawn, is left out',
        "weights: no further change",
    ]


def test_fingerprint_other_batch_size_moves_phases_and_says_so(sources: dict[str, TokenDataset]) -> None:
    phases = [{"web": 3, "code": 1}, {"web": 1, "code": 1}]
    was = fingerprint(mixture(sources, *phases), "train", SEQ_LEN, 5)
    now = fingerprint(mixture(sources, *phases, size=16), "train", SEQ_LEN, 5)
    changes, _ = compare_data(was, now, 96)
    assert len(changes) == 1
    assert "global_batch_size samples, and the size was 8, is 16: set start_step" in changes[0]
    changes, additions = compare_data(was, now, 40)
    assert changes == []
    assert "the size was 8, is 16" in additions[0]


def test_fingerprint_other_past_is_other_data(tmp_path: Path, sources: dict[str, TokenDataset]) -> None:
    was = fingerprint(mixture(sources, {"web": 3, "code": 1}), "train", SEQ_LEN, 5)
    weights = fingerprint(mixture(sources, {"web": 1, "code": 1}), "train", SEQ_LEN, 5)
    assert compare_data(was, weights, 8)[0]
    assert compare_data(was, weights, 0) == ([], ["weights: code 50%, web 50% from step 0 on"])
    longer = {**sources, "web": source(tmp_path / "longer", 0, 21)}
    changes, _ = compare_data(
        was, fingerprint(mixture(longer, {"web": 3, "code": 1}), "train", SEQ_LEN, 5), 8
    )
    assert [line.split(":")[0] for line in changes] == ['source "web"'] * 2
    one = fingerprint(sources["web"], "train", SEQ_LEN, 5)
    assert compare_data(one, was, 8) == (["the data: was one dataset, is a mixture (data.sources)"], [])
    assert compare_data(was, {**was, "seed": 6}, 8)[0] == ["the seed of the data order: was 5, is 6"]


def test_different_tokenizers_are_refused_by_name(
    sources: dict[str, TokenDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Known:
        tokenizer, tokenizer_digest, separator_id = "bytes", "a", 256

    class Other(Known):
        tokenizer, tokenizer_digest = "llama", "b"

    class Separated(Known):
        separator_id = 7

    monkeypatch.setattr(sources["web"], "index", Known)
    for index, problem in (
        (Other, "different tokenizers, llama and bytes"),
        (Separated, "separators.*7 and 256"),
    ):
        monkeypatch.setattr(sources["code"], "index", index)
        with pytest.raises(DataError, match=f'"code" and "web" have.*{problem}'):
            mixture(sources, {"web": 1, "code": 1})


def test_batch_at_a_far_cursor_is_found_at_once(sources: dict[str, TokenDataset]) -> None:
    order = mixture(sources, {"web": 1, "code": 2}, {"web": 2, "code": 1}).split("train", SEQ_LEN).order
    far = batch_ids(Cursor(10**12), order, 8)
    assert far.tolist() == order.ids_at(np.arange(10**12, 10**12 + 8)).tolist()
    assert Counter(order.sources_of(far).tolist())[1] in (5, 6), "web is two of three"


# -- runs --------------------------------------------------------------------------------------------------

TABLE = '{{name = "{}", text = "x", weight = 1{}}}'


def job_of(*options: str) -> JobConfig:
    tables = ", ".join(TABLE.format(name, ', when_used_up = "stop"') for name in ("web", "code"))
    return load_job(None, [f"--data.sources=[{tables}]", "--train.global_batch_size=8", *options]).job


def test_job_ends_with_its_data_wherever_it_begins(sources: dict[str, TokenDataset]) -> None:
    """Web is used up at position 40, which is step 5, or 3 steps after a warm start at position 16."""
    samples = mixture(sources, {"web": 1, "code": 1}, stops=("web",)).split("train", SEQ_LEN)
    assert samples.end is not None
    assert samples.end.position in (40, 41)
    for step, cursor, last in ((0, 0, 5), (100, 16, 103), (0, 16, 3)):
        job, used_up = end_with_data(job_of(), samples, 8, step=step, cursor=cursor)
        assert (job.train.max_steps, used_up) == (last, "web")
    job, used_up = end_with_data(job_of("--train.max_steps=5"), samples, 8)
    assert (job.train.max_steps, used_up) == (5, "")
    with pytest.raises(DataError, match=r'source "web" is used up after step 0 .*so that nothing can be'):
        end_with_data(job_of(), samples, 64)
    with pytest.raises(
        ConfigError, match=r'"web" is used up after step 5(.|\n)*scheduler.warmup_steps: 9 is more'
    ):
        end_with_data(job_of("--scheduler.warmup_steps=9"), samples, 8)
    assert end_with_data(job_of(), sources["web"].split("train", SEQ_LEN), 8)[1] == ""


def test_run_length_tells_the_epochs_of_sources() -> None:
    epochs = {f"s{i}": i / 2 for i in range(6)}
    length = run_length(job_of("--train.max_steps=5"), 8, epochs=epochs, used_up="s5")
    assert length.startswith('5 steps (then source "s5" is used up), ')
    assert length.endswith(
        "2.5 epochs of s5, 2 epochs of s4, 1.5 epochs of s3, 1 epochs of s2, fewer of 2 more sources"
    )


@pytest.mark.parametrize(
    ("sources_toml", "phases_toml", "problem"),
    [
        ('{name = "a b", text = "x", weight = 1}', "", 'sources[0].name: "a b" cannot be part of a metric'),
        ('{name = "a", weight = 1}', "", "sources[0].text: neither text nor dataset_path is set"),
        ('{name = "a", text = "x", dataset_path = "y", weight = 1}', "", "dataset_path are both set"),
        ('{name = "a", text = "x", weight = 0}', "", "data.sources: all weights are 0"),
        ('{name = "a", text = "x"}', "", "data.sources[0].weight: is missing"),
        ("", '{start_step = 3, weights = {b = 1}}', '"b" is not the name of a source; known: a, c'),
        ("", '{start_step = 3, weights = {a = 0}}', "data.phases[0].weights: all weights are 0"),
        (
            "",
            "{start_step = 3, weights = {a = 1}}, {start_step = 3, weights = {c = 1}}",
            "data.phases[1].start_step: 3 is not above the start_step of the phase before, 3",
        ),
    ],
)  # fmt: skip
def test_config_of_a_mixture_names_its_faults(sources_toml: str, phases_toml: str, problem: str) -> None:
    given = sources_toml or ", ".join(TABLE.format(name, "") for name in ("a", "c"))
    with pytest.raises(ConfigError) as raised:
        load_job(None, [f"--data.sources=[{given}]", f"--data.phases=[{phases_toml}]"])
    assert problem in str(raised.value)


def test_config_of_a_mixture_excludes_other_data() -> None:
    for options, problem in (
        (["--data.text=x"], "text and sources are set"),
        (["--data.dataset_path=x"], "dataset_path and sources are set"),
    ):
        with pytest.raises(ConfigError, match=problem):
            job_of(*options)
    with pytest.raises(ConfigError, match=r"data\.phases: has no effect without data.sources"):
        load_job(None, ["--data.text=x", "--data.phases=[{start_step = 1, weights = {a = 1}}]"])
    unread = ", ".join(['{name = "a", text = "x", weight = 1}', '{name = "b", text = "x", weight = 0}'])
    assert load_job(None, [f"--data.sources=[{unread}]", "--eval.interval=5"]).job.data.weights()[0]["b"] == 0
    with pytest.raises(ConfigError, match=r'sources\[1\].weight: nothing reads "b"'):
        load_job(None, [f"--data.sources=[{unread}]", "--eval.interval=0"])


def test_validation_where_nothing_counts_names_the_source(sources: dict[str, TokenDataset]) -> None:
    class NothingCounts:
        num_evaluated = 0

        def evaluate(self, batches: Any) -> float:
            return math.nan

    job = load_job(None, ["--data.text=python-stdlib", "--train.global_batch_size=8"]).job
    parts: Any = {"web": sources["web"].split("train", SEQ_LEN)}
    step: Any = NothingCounts()
    with pytest.raises(DataError, match='of the validation split of source "web": all targets'):
        validation_losses(step, parts, job, job.geometry(1), rank=0)


def test_fault_in_a_source_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mixture.toml"
    file.write_text('[[data.sources]]\nname = "a"\ntext = "a.txt"\n')
    with pytest.raises(ConfigError, match=r"sources\[0\].weight: is missing.*\[.*mixture.toml\]"):
        load_job(file, [])


def test_text_beside_a_mixture_is_refused_with_what_to_type() -> None:
    given = '--data.sources=[{name = "a", text = "a.txt", weight = 1}]'
    with pytest.raises(ConfigError, match=r"text and sources.*--data.sources=\[\] --data.phases=\[\]"):
        load_job(None, [given, "--data.text=python-stdlib"])
