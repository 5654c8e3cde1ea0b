"""Timers, FLOP/s arithmetic, and the fan-out."""

from __future__ import annotations

from typing import Any

import pytest
from support.clock import FakeClock

from kempnerforge.telemetry import sinks as sinks_module
from kempnerforge.telemetry import spans as spans_module
from kempnerforge.telemetry.flops import mfu, peak_bf16_flops
from kempnerforge.telemetry.sinks import Row, SinkSet
from kempnerforge.telemetry.spans import Spans


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of spans and sinks."""
    return FakeClock().replace_in(monkeypatch, spans_module, sinks_module)


# Spans


def test_spans_nested_and_repeated_add_up(clock: FakeClock) -> None:
    spans = Spans("cpu")
    with spans.span("step"):
        for _ in range(2):
            with spans.span("forward_backward"):
                clock.advance(0.25)
        with spans.span("optimizer", host=True):
            clock.advance(0.125)
        clock.advance(1.0)
    assert list(spans.collect().items()) == [
        ("time/forward_backward_s", 0.5),
        ("time/optimizer_s", 0.125),
        ("time/step_s", 1.625),
    ]
    assert spans.collect() == {}


def test_spans_error_in_body_timed_and_raised(clock: FakeClock) -> None:
    spans = Spans("cpu")

    def fail() -> None:
        clock.advance(0.5)
        raise KeyError

    with pytest.raises(KeyError), spans.span("data"):
        fail()
    assert spans.collect() == {"time/data_s": 0.5}


def test_spans_cuda_time_device_without_waiting(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock does not move, and nothing waits for the device before ``collect``."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("waited for the device")

    new_event = torch.cuda.Event
    made: list[torch.cuda.Event] = []

    def counted(**options: Any) -> torch.cuda.Event:
        made.append(new_event(**options))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", counted)
    spans = Spans("cuda")
    matrix = torch.ones(4096, 4096, device="cuda")
    for _ in range(2):  # the second round uses the events of the first again
        marks = [new_event(enable_timing=True) for _ in range(4)]
        with monkeypatch.context() as patch:
            for owner in (torch.cuda, new_event, torch.cuda.Stream):
                patch.setattr(owner, "synchronize", fail)
            marks[0].record()
            with spans.span("forward_backward"):
                marks[1].record()
                for _ in range(20):
                    torch.mm(matrix, matrix)
                marks[2].record()
            marks[3].record()
            with spans.span("data", host=True):
                clock.advance(0.5)
        torch.cuda.synchronize()
        seconds = spans.collect()
        # As long as events inside and around it say; their resolution is half a microsecond.
        inside_s, around_s = (first.elapsed_time(last) / 1000 for first, last in (marks[1:3], marks[::3]))
        assert 0 < inside_s <= seconds["time/forward_backward_s"] + 1e-5
        assert seconds["time/forward_backward_s"] <= around_s + 1e-5
        assert seconds["time/data_s"] == 0.5
    assert len(made) == 2


# FLOP/s


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("Tesla T4", None),
    ],
)
def test_peak_flops_device_name_matches(name: str, peak: float | None) -> None:
    assert peak_bf16_flops(name) == peak


def test_mfu_known_case_matches() -> None:
    # 8 devices that reach half of their peak.
    assert mfu(tokens_per_s=80_000, flops_per_token=49.47e9, num_devices=8, peak=989.4e12) == pytest.approx(
        0.5
    )


# The fan-out


class ListSink:
    def __init__(self, log: list[Any], name: str, *, fail_on_close: bool = False) -> None:
        self.log, self.name, self.fail_on_close = log, name, fail_on_close

    def write(self, row: Row) -> None:
        self.log.append((self.name, dict(row)))

    def close(self) -> None:
        self.log.append((self.name, "closed"))
        if self.fail_on_close:
            raise OSError(self.name)


def test_sink_set_every_sink_gets_row_with_same_time(clock: FakeClock) -> None:
    log: list[Any] = []
    sinks = SinkSet([ListSink(log, "a"), ListSink(log, "b")])
    row = {"step": 1}
    sinks.write(row)
    sinks.write({"step": 2, "time": 5.0})
    assert row == {"step": 1}
    (_, first), (_, second) = log[:2]
    assert first == second == {"step": 1, "time": clock.now}
    assert log[2:] == [("a", {"step": 2, "time": 5.0}), ("b", {"step": 2, "time": 5.0})]


def test_sink_set_close_error_closes_all_and_raises() -> None:
    log: list[Any] = []
    sinks = SinkSet([ListSink(log, "a"), ListSink(log, "b", fail_on_close=True)])
    with pytest.raises(OSError, match="b"):
        sinks.close()
    assert log == [("b", "closed"), ("a", "closed")]


def test_sink_set_empty_accepts_rows() -> None:
    sinks = SinkSet()
    sinks.write({"step": 1})
    sinks.close()
