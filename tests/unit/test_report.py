"""What ``kempnerforge report`` works out and draws: tables of histories, intervals, ticks and odd runs."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from array import array
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kempnerforge.cli.report import app
from kempnerforge.cli.report_page import KEYS, Report, page
from kempnerforge.cli.report_text import MAX_REASON, PARTS, remarks
from kempnerforge.cli.report_timeline import Commit
from kempnerforge.cli.run_facts import attempt_changes, run_facts
from kempnerforge.errors import RunFolderError
from kempnerforge.goodput import accounting
from kempnerforge.goodput.accounting import account, interruptions, saving
from kempnerforge.goodput.history import AttemptHistory, derive
from kempnerforge.goodput.interval import daly, expected_overhead
from kempnerforge.goodput.plot import downsample, duration, linear_axis, log_axis, number, time_axis
from kempnerforge.goodput.timeline_segments import Segment, find_segments, rasterize
from kempnerforge.telemetry.curves import Curve, Curves, read_curves
from kempnerforge.telemetry.jsonl import effective_rows, read_rows

SETUP = {"process_groups": 1.0, "folder": 2.0, "data": 0.5, "model": 1.5, "resume": 5.0}
HOSTILE = '<script>document.title="owned"</script><img src=http://example.org/x.png onerror=a()>"\'&\0\ud800'


def write_run(folder: Path, events: list[dict[str, Any]], rows: list[dict[str, Any]] | None = None) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def attempt(
    number: int, begun: float, *, at: int, to: int, commits: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """One that sets up for 8 s, loads for 2 s, does a step a second, and says so at the end of each ten."""
    common = {"attempt": number}
    loop = begun + 10
    found = [
        {"event": "start", **common, "time": begun + 3, "process_started": begun, "hosts": ["a"]},
        {"event": "resume", **common, "time": loop, "step": at, "load_s": 2.0, "setup_s": SETUP},
    ]
    for step in range(at + 1, to + 1):
        if step % 10 == 0 or step == to:
            spent = {"step": 0.9 * (step - at), "data": 0.1 * (step - at)}
            found.append(
                {"event": "progress", **common, "time": loop + step - at, "step": step, "spent_s": spent}
            )
        if step in commits:
            took = {"blocking_s": 0.25, "write_s": 1.0, "commit_s": 0.1, "total_s": 2.0}
            found.append({"event": "commit", **common, "time": loop + step - at + 2, "step": step, **took})
    return found


TWICE_KILLED = [
    *attempt(1, 1000.0, at=0, to=45, commits=(20, 40)),
    *[{"event": "start", "attempt": 2, "time": 1061.0, "process_started": 1060.0, "hosts": ["a"]}],
    *attempt(3, 1070.0, at=40, to=60, commits=(60,)),
    {
        "event": "end",
        "attempt": 3,
        "time": 1102.0,
        "kind": "finished",
        "reason": "done",
        "step": 60,
        "spent_s": {},
    },
]


def test_account_setup_parts_sum_to_wall_time() -> None:
    body = account(derive(TWICE_KILLED, []), now=0.0, running=False)
    assert body["wall_s"] == 102.0
    assert sum(body["parts_s"].values()) == pytest.approx(102.0)
    assert list(body["parts_s"]) == list(accounting.PARTS) == list(PARTS)
    # Two attempts began, with 8 s of set-up and 2 s of load each; one did not, and had 1 s.
    assert body["parts_s"]["load"] == 4.0
    assert body["parts_s"]["setup"] == 17.0
    parts = {
        "process_groups": 2.0,
        "folder": 4.0,
        "data": 1.0,
        "model": 3.0,
        "resume": 6.0,
        "unfinished": 1.0,
    }
    assert body["setup_parts_s"] == pytest.approx(parts)
    assert body["parts_s"]["lost"] == pytest.approx(4.5)
    assert body["parts_s"]["idle"] == pytest.approx(5.0 + 9.0)


MOMENTS = st.floats(-4000, 4000)


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Ledgers of runs whose clocks jump, whose attempts overlap, and which end in every way."""
    events: list[dict[str, Any]] = []
    for place in range(1, draw(st.integers(1, 5)) + 1):
        begun = 1e6 + draw(MOMENTS)
        first = draw(st.integers(0, 30))
        made = attempt(place, begun, at=first, to=first + draw(st.integers(0, 40)), commits=(first + 5,))
        made = made[: draw(st.integers(1, len(made)))]
        kind = draw(st.sampled_from(["finished", "stopped", "fault", "config", "blocked", None]))
        if kind is not None:
            end = {
                "event": "end",
                "attempt": place,
                "kind": kind,
                "reason": "",
                "step": first,
                "spent_s": {},
            }
            made.append({**end, "time": begun + draw(MOMENTS)})
        for event in made[draw(st.integers(0, len(made))) :]:
            event["time"] += draw(MOMENTS)  # the clock is set
        events += made
    return events


@given(events=histories(), running=st.booleans(), now=MOMENTS)
def test_account_parts_sum_in_every_history(events: list[dict[str, Any]], running: bool, now: float) -> None:
    body = account(derive(events, []), now=1e6 + now, running=running)
    assert sum(body["parts_s"].values()) == pytest.approx(body["wall_s"], abs=1e-6)
    assert all(seconds >= 0 for seconds in body["parts_s"].values()), body["parts_s"]
    assert sum(body["setup_parts_s"].values()) == pytest.approx(body["parts_s"]["setup"], abs=1e-6)
    assert 0 <= body["ettr"] <= 1
    assert body["wall_s"] <= body["span_s"] + 1e-6
    for one in body["attempts"]:
        assert sum(one["parts_s"].values()) == pytest.approx(one["wall_s"], abs=1e-6)
    found = find_segments(body["attempts"])
    assert all(0 <= one.began <= one.ended <= body["span_s"] + 1e-6 for one in found)
    assert all(later.began >= one.ended - 1e-6 for one, later in itertools.pairwise(found))


def test_account_overlap_and_clock_set_back_are_said() -> None:
    overlap = [*attempt(1, 1000.0, at=0, to=40), *attempt(2, 1030.0, at=20, to=60)]
    body = account(derive(overlap, []), now=0.0, running=False)
    assert body["clocks_disagree"]
    assert body["wall_s"] == pytest.approx(80.0)
    assert remarks(body) == ["attempts overlap, or their clocks disagree: times are approximate"]
    set_back = [*attempt(1, 1000.0, at=0, to=40)[:1], *attempt(1, 0.0, at=0, to=4)[1:]]
    assert account(derive(set_back, []), now=0.0, running=False)["wall_s"] >= 0
    assert not account(derive(TWICE_KILLED, []), now=0.0, running=False)["clocks_disagree"]


def test_account_refused_starts_and_pauses_not_counted() -> None:
    """A finished run that is started again months later, after a typo in its config."""
    refused = {"event": "end", "attempt": 4, "kind": "config", "reason": "typo", "step": None, "time": 5e6}
    late = [
        {"event": "start", "attempt": 4, "time": 5e6 - 1, "process_started": 5e6 - 2, "hosts": ["a"]},
        refused,
        *attempt(5, 9e6, at=60, to=70),
    ]
    before = account(derive(TWICE_KILLED, []), now=0.0, running=False)
    after = account(derive([*TWICE_KILLED, *late], []), now=0.0, running=False)
    assert after["parts_s"]["idle"] == before["parts_s"]["idle"]
    assert after["wall_s"] == pytest.approx(before["wall_s"] + 20.0)
    assert [one["attempt"] for one in after["attempts"]] == [1, 2, 3, 5]
    assert after["refused_starts"] == 1
    assert remarks(after) == ["not counted: 1 start refused by the config or the crash-loop guard"]


def test_saving_attempts_killed_in_set_up_are_no_failures() -> None:
    """The rule that ``interval = "auto"`` goes by."""
    starts = [
        {"event": "start", "attempt": n, "time": 2000.0 + n, "process_started": 2000.0 + n, "hosts": ["a"]}
        for n in range(2, 22)
    ]
    events = [*attempt(1, 1000.0, at=0, to=40), *starts, *attempt(22, 3000.0, at=40, to=60)]
    history = derive(events, [])
    assert saving(history, wall_s=90.0)["failures"] == 1
    assert interruptions(history, resumed_at=40)[0] == 1


def test_find_segments_known_run_matches() -> None:
    body = account(derive(TWICE_KILLED, []), now=0.0, running=False)
    found = find_segments(body["attempts"])
    assert [(one.attempt, one.kind, one.began, one.ended) for one in found] == [
        (1, "setup", 0, 8),
        (1, "load", 8, 10),
        (1, "training", 10, 50),
        (1, "lost", 50, 55),
        (2, "idle", 55, 60),
        (2, "setup", 60, 61),
        (3, "idle", 61, 70),
        (3, "setup", 70, 78),
        (3, "load", 78, 80),
        (3, "training", 80, 102),
    ]


def test_rasterize_many_segments_fit_columns() -> None:
    found = [Segment(1, "setup", 0, 2), Segment(1, "training", 2, 6.4), Segment(1, "lost", 6.4, 10)]
    assert rasterize(found, wall_s=10, columns=5) == [(0, 1, "setup"), (1, 3, "training"), (3, 5, "lost")]
    many = [Segment(n, "training" if n % 2 else "idle", n / 10, n / 10 + 0.1) for n in range(100_000)]
    assert len(rasterize(many, wall_s=10_000, columns=600)) <= 600


@pytest.mark.parametrize(
    ("interval_s", "known", "expected"),
    [
        # Half an interval of an MTTI of 1000 s is lost; nothing else costs anything.
        (100.0, {"stall_s": 0.0, "mtti_s": 1000.0}, 0.05),
        (100.0, {"stall_s": 100.0, "mtti_s": 1e12}, 0.5),
        (100.0, {"stall_s": 25.0, "mtti_s": 1000.0, "lag_s": 20.0, "restart_s": 30.0}, 1 - 0.9 / 1.25),
        # Where the model is no longer valid, all is lost and not more.
        (100.0, {"stall_s": 1.0, "mtti_s": 10.0}, 1.0),
    ],
)
def test_expected_overhead_table_matches(interval_s: float, known: dict[str, float], expected: float) -> None:
    assert expected_overhead(interval_s, **known) == pytest.approx(expected)


@pytest.mark.parametrize(("stall_s", "mtti_s"), [(0.1, 3600.0), (2.0, 3600.0), (20.0, 36_000.0)])
def test_daly_interval_near_optimum_of_model(stall_s: float, mtti_s: float) -> None:
    at_daly = expected_overhead(daly(stall_s, mtti_s), stall_s=stall_s, mtti_s=mtti_s)
    others = [expected_overhead(10 ** (n / 50), stall_s=stall_s, mtti_s=mtti_s) for n in range(-100, 250)]
    assert min(others) <= at_daly * 1.001
    assert at_daly <= min(others) * 1.02


def test_saving_other_interval_known_case_matches() -> None:
    history = derive(TWICE_KILLED, [])
    found = saving(history, wall_s=90.0)
    # Saves begin at steps 20 and 40 of the first attempt, and 20 steps into the third.
    assert found["interval_s"] == pytest.approx(20.0)
    # Attempt 2 did not get as far as training; the others trained for 45 and 22 s.
    assert found["failures"] == 1
    known = {"stall_s": 0.25, "mtti_s": 67.0, "lag_s": 2.0, "restart_s": 10.0}
    best_s = daly(0.25, 67.0)
    overhead, best = expected_overhead(20.0, **known), expected_overhead(best_s, **known)
    wanted = {**known, "best_interval_s": best_s, "overhead": overhead, "best_overhead": best}
    assert found["expected"] == pytest.approx({**wanted, "saved_s": 90.0 * (overhead - best)})
    assert found["expected"]["saved_s"] > 0


def test_saving_interval_not_shorter_than_save() -> None:
    events = [{**event, "total_s": 12.0} if event["event"] == "commit" else event for event in TWICE_KILLED]
    found = saving(derive(events, []), wall_s=90.0)
    assert found["daly_s"] < 12.0
    assert found["expected"]["best_interval_s"] == 12.0


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (linear_axis(0, 210, margin=0), ["0", "50", "100", "150", "200"]),
        (linear_axis(2.31, 5.6), ["3", "4", "5"]),
        (linear_axis(0.2, 0.24), ["0.20", "0.21", "0.22", "0.23", "0.24"]),
        (linear_axis(1, 3, margin=0, least=1), ["1", "2", "3"]),
        (linear_axis(7, 7, least=1), ["4", "6", "8", "10"]),
        (linear_axis(3, 3), ["2", "3", "4"]),
        (linear_axis(0, 0), ["-0.4", "-0.2", "0.0", "0.2", "0.4"]),
        (linear_axis(0, 1e6, margin=0), ["0", "200k", "400k", "600k", "800k", "1.0M"]),
        (log_axis(0.5, 900), ["1", "10", "100", "1,000"]),
        (log_axis(1.8, 14.5), ["2", "3", "5", "10"]),
        (time_axis(8.7), ["0", "2 s", "4 s", "6 s", "8 s"]),
        (time_axis(300), ["0", "1 min", "2 min", "3 min", "4 min", "5 min"]),
        (time_axis(500_000), ["0", "1 d", "2 d", "3 d", "4 d", "5 d"]),
        (time_axis(0), ["0", "1 ms"]),
    ],
)
def test_axis_ticks_table_matches(axis: Any, labels: list[str]) -> None:
    assert [label for _, label in axis.ticks] == labels
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value, _ in axis.ticks)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *(
            (0, "0 ms"),
            (0.0731, "73.1 ms"),
            (0.99991, "1 s"),
            (12.345, "12.3 s"),
            (59.99, "1 min"),
            (250, "4 min 10 s"),
        ),
        *((3599.9, "1 h"), (4000, "1 h 7 min"), (86_399, "1 d"), (1e6, "11 d 14 h"), (1e8, "1157 d 10 h")),
    ],
)
def test_duration_text_table_matches(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_number_text_table_matches() -> None:
    assert [number(value, 100) for value in (0, 1500, 20_000, 20_500, 3.25e6)] == [
        "0",
        "1,500",
        "20.0k",
        "20.5k",
        "3.2500M",
    ]


def test_thin_keeps_every_spike() -> None:
    values = [float(n % 7) for n in range(10_000)]
    values[1234], values[8765], values[5000] = 99.0, -99.0, math.nan
    found = downsample(range(10_000), values, buckets=100)
    assert len(found) == 100
    assert max(found, key=lambda one: one.high).first <= 1234 <= max(found, key=lambda one: one.high).last
    assert min(found, key=lambda one: one.low).first <= 8765 <= min(found, key=lambda one: one.low).last
    assert sum(one.mean for one in found) / 100 == pytest.approx(3.0, abs=0.1)
    assert [one.mean for one in downsample([1, 2, 3], [5.0, math.inf, 7.0], buckets=3)] == [5.0, 7.0]
    assert downsample([], [], buckets=3) == []


def test_curves_rows_match_counting_rule(tmp_path: Path) -> None:
    resumes = {1: 0, 2: 30, 3: 20}
    rows = [
        {
            "step": step,
            "attempt": number,
            "time": 0.0,
            "train/loss": "NaN" if step == 33 else step + number / 10,
        }
        for number, (begun, ended) in {1: (0, 40), 2: (30, 50), 3: (20, 60)}.items()
        for step in range(begun + 1, ended + 1)
    ]
    path = write_run(tmp_path / "run", [], rows) / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 61, "att\n[1]\n{"step": 3}\n{"step": 4, "attempt": 1, "train/loss": null}\n\n')
    found = read_curves(path, ["train/loss", "eval/loss"], resumes)
    counting = effective_rows(read_rows(path).rows[: len(rows)], resumes)
    curve = found.counting["train/loss"]
    assert list(curve.steps) == [row["step"] for row in counting]
    assert repr(list(curve.values)) == repr([float(row["train/loss"]) for row in counting])
    repeated = found.repeated["train/loss"]
    assert [list(one.steps) for one in repeated.values()] == [list(range(21, 41)), list(range(31, 51))]
    assert sum(len(one.steps) for one in repeated.values()) + len(counting) == len(rows)
    assert not found.counting["eval/loss"].steps
    assert not read_curves(tmp_path / "none", KEYS, {}).counting["train/loss"].steps


class Checked(HTMLParser):
    """Fails on what is not closed in order; remembers elements, words and links."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.links += [name for name, _ in attrs if name in ("src", "href", "style") and name != "style"]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def made(history: list[AttemptHistory], curves: Curves, *, run_dir: str = "runs/x") -> tuple[Checked, str]:
    body = account(history, now=2000.0, running=False)
    body["saving"] = saving(history, wall_s=body["wall_s"] - body["parts_s"]["idle"])
    body["run"], changes = run_facts(history, {}), attempt_changes(history, [])
    for row in body["attempts"]:
        row["changes"] = changes[row["attempt"]]
    commits = [Commit(one.number, event["time"], event["step"]) for one in history for event in one.commits]
    text = page(Report(run_dir, body, curves, commits, 2000.0)).decode()
    checked = Checked(text)
    assert "script" not in checked.elements
    assert checked.links == []
    return checked, text


def curves(loss: list[float], *, first: int = 1) -> Curves:
    found = Curves({key: Curve() for key in KEYS}, {key: {} for key in KEYS})
    steps = array("d", range(first, first + len(loss)))
    found.counting["train/loss"] = Curve(steps, array("d", loss))
    found.counting["train/tokens_per_s"] = Curve(steps, array("d", [1000.0] * len(loss)))
    return found


@pytest.mark.parametrize(
    ("events", "loss", "said"),
    [
        ([], [], ["No attempt has recorded enough", "No values have been logged yet"]),
        (TWICE_KILLED[:1], [], ["lost", "none yet", "No values"]),
        (attempt(1, 0.0, at=0, to=5), [3.0], ["Training loss from 3 at step 1", "There was no failure yet"]),
        (attempt(1, 0.0, at=0, to=5), [math.nan] * 3, ["3 steps had a training loss that is not finite."]),
        (
            attempt(1, 0.0, at=0, to=5),
            [2.0, math.inf, 1.0],
            ["1 step had a training loss that is not finite."],
        ),
        (attempt(1, 0.0, at=0, to=5), [0.0] * 4, ["lowest 0 near step 1"]),
        (TWICE_KILLED, [9.0, 0.1], ["loss, logarithmic scale", "First-order estimate"]),
    ],
)
def test_page_odd_run_says_what_is_missing(
    events: list[dict[str, Any]], loss: list[float], said: list[str]
) -> None:
    checked, _ = made(derive(events, []), curves(loss))
    for words in said:
        assert words in checked.words


def test_page_hostile_text_is_escaped() -> None:
    end = {
        "event": "end",
        "attempt": 3,
        "time": 1103.0,
        "kind": HOSTILE,
        "reason": HOSTILE + "x" * 5000,
        "step": 60,
    }
    checked, text = made(derive([*TWICE_KILLED[:-1], end], []), curves([1.0]), run_dir=f"runs/{HOSTILE}")
    assert "img" not in checked.elements
    assert checked.words.count('<script>document.title="owned"</script>') >= 3
    assert "x" * (MAX_REASON + 1) not in text


def test_page_million_rows_small_and_shows_spike() -> None:
    draw = random.Random(1)
    loss = [2 + draw.random() for _ in range(1_000_000)]
    loss[700_000] = 50.0
    found = curves(loss)
    found.counting["train/tokens_per_s"] = Curve()
    found.counting["train/lr"] = found.counting["train/grad_norm"] = found.counting["train/loss"]
    checked, text = made(derive(attempt(1, 0.0, at=0, to=1_000_000), []), found)
    assert len(text) < 600_000
    assert "highest 50" in checked.words
    assert "the band their range" in checked.words


def test_page_thousands_of_attempts_small() -> None:
    events: list[dict[str, Any]] = []
    found = curves([2.0] * 4000)
    for place in range(2000):
        at = 2 * place
        events += attempt(place + 1, 100.0 * place, at=at, to=at + 9, commits=(at + 2,))
        steps = array("d", range(at + 3, at + 10))
        found.repeated["train/loss"][place + 1] = Curve(steps, array("d", [2.0] * 7))
    checked, text = made(derive(events, []), found)
    assert len(text) < 1_000_000
    assert "1,800 older attempts omitted" in checked.words
    assert 'data-attempts="2000"' in text


@pytest.mark.parametrize("file", ["none/page.html", "file/page.html"])
def test_report_unwritable_page_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    run = write_run(tmp_path / "run", TWICE_KILLED)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFolderError, match=f"^{file} cannot be written: .*; give --html a file"):
        app([str(run), "--html", file], standalone_mode=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


@pytest.mark.parametrize("folder", [".", "/", ""])
def test_report_folder_as_page_status_2(tmp_path: Path, folder: str) -> None:
    done = CliRunner().invoke(app, [str(write_run(tmp_path / "run", TWICE_KILLED)), "--html", folder])
    assert done.exit_code == 2
    assert "is a directory" in done.output


def test_report_json_with_page_stays_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": 1, "attempt": 1, "time": 0.0, "train/loss": 2.5, "train/tokens_per_s": 10.0}]
    run = write_run(tmp_path / "run", TWICE_KILLED, rows)
    app([str(run), "--html", str(tmp_path / "page.html"), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["lost_steps"] == 5
    assert "Training loss from 2.5 at step 1" in (tmp_path / "page.html").read_text()


# What a run is


def recorded(config: dict[str, Any], *, commit: str = "a" * 40, dirty: bool = False) -> dict[str, Any]:
    """What the harness adds to the ``start`` event."""
    settings = {"train.max_steps": 60, "train.seq_len": 10, "optimizer.lr": 0.1, **config}
    return {
        "config": settings,
        "device": "NVIDIA H100",
        "version": "0.1.0",
        "git": {"commit": commit, "dirty": dirty},
        "layout": {"num_ranks": 2, "dp_shard": 2},
    }


def write_recorded_run(folder: Path, lr: float = 0.2, *, losses: float = 3.0) -> Path:
    """A run of two attempts, the second of which changes the learning rate and the code."""
    first, second = attempt(1, 1000.0, at=0, to=30, commits=(30,)), attempt(2, 1100.0, at=30, to=60)
    first[0] |= recorded({})
    second[0] |= recorded({"optimizer.lr": lr, "train.seed": 7}, commit="b" * 40, dirty=True)
    second[1] |= {"train_samples": 40, "parameters": 1_234_567}
    end = {"event": "end", "attempt": 2, "time": 1145.0, "kind": "finished", "step": 60, "spent_s": {}}
    rows = [
        {
            "step": step,
            "attempt": 1 if step <= 30 else 2,
            "time": 1010.0 + step,
            "train/loss": losses - step / 60,
            "train/lr": 0.1 / step,
            "train/grad_norm": 1.5,
            "train/mfu": 0.4321,
            "train/tokens": 10 * step,
            "train/tokens_per_s": 10.0,
            **({"eval/loss": losses} if step % 30 == 0 else {}),
        }
        for step in range(1, 61)
    ]
    return write_run(folder, [*first, *second, {**end, "reason": "finished at step 60. Files: here"}], rows)


def test_report_says_what_run_is_and_what_changed(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run")
    said = CliRunner().invoke(app, [str(run), "--html", str(tmp_path / "page.html")]).output
    checked = Checked((tmp_path / "page.html").read_text())
    for words in (
        "1.2M parameters",
        "2 x NVIDIA H100 on a",
        f"{'b' * 12} with uncommitted changes",
        "60 of 60",
        "600, 1.5 epochs",
        "0.00167",
        "43.2%",
    ):
        assert words in said
        assert words in checked.words
    changed = [
        "optimizer.lr: 0.1 -> 0.2",
        "train.seed: none -> 7",
        f"code: {'a' * 12} -> {'b' * 12} with uncommitted changes",
    ]
    assert [line.removeprefix("  changed ") for line in said.splitlines() if "  changed " in line] == changed
    for words in (*changed, "Learning rate from 0.1 at step 1", "Gradient norm from 1.5", "train.max_steps"):
        assert words in checked.words
    body = json.loads(CliRunner().invoke(app, [str(run), "--json"]).output)
    assert [row["changes"] for row in body["attempts"]] == [[], changed]
    assert body["run"]["mfu"] == 0.4321


def test_report_reason_is_said_once(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run")
    said = CliRunner().invoke(app, [str(run), "--html", str(tmp_path / "page.html")]).output
    assert "; finished: at step 60. Files: here\n" in said
    page_text = (tmp_path / "page.html").read_text()
    assert "finished at step" not in page_text
    assert Checked(page_text).words.count("at step 60. Files: here") == 1


def test_report_older_run_takes_changes_from_receipts(tmp_path: Path) -> None:
    """Older versions did not record the config in the ledger."""
    run = write_run(tmp_path / "run", TWICE_KILLED, [])
    receipts = [
        {"attempt": 1, "step": 0},
        {"attempt": 3, "step": 40, "config_changes": {"train.seed": [1, 2]}},
    ]
    (run / "receipts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in receipts))
    said = CliRunner().invoke(app, [str(run)]).output
    assert said.count("  changed ") == 1
    assert "  changed train.seed: 1 -> 2\n" in said
    assert "code" not in said, "nothing is said of what nobody recorded"


def test_report_two_runs_compares_config_losses_goodput(tmp_path: Path) -> None:
    first = write_recorded_run(tmp_path / "first")
    second = write_recorded_run(tmp_path / "second", lr=0.3, losses=2.0)
    said = CliRunner().invoke(app, [str(first), str(second)]).output
    assert re.search(r"^  optimizer\.lr +0\.2 +0\.3$", said, re.M)
    assert "train.seed" not in said, "it is the same in both"
    assert re.search(r"^ +step 60  2\.0000  1\.0000  -1\.0000$", said, re.M)
    assert re.search(r"^effective training +\d+\.\d% of .* +\d+\.\d% of", said, re.M)
    body = json.loads(CliRunner().invoke(app, [str(first), str(second), "--json"]).output)
    assert body["config"] == {"optimizer.lr": [0.2, 0.3]}
    assert body["losses"]["eval/loss"] == [[30, 3.0, 2.0], [60, 3.0, 2.0]]
    assert len(body["losses"]["train/loss"]) == 12
    assert [one["tokens_per_s"] for one in body["runs"]] == [10.0, 10.0]
    for wrong in ([str(first)] * 3, [str(first), str(second), "--html", str(tmp_path / "page.html")]):
        assert CliRunner().invoke(app, wrong).exit_code == 2
