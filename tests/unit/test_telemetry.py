"""Timers, FLOP/s arithmetic, and the fan-out."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kempnerforge.telemetry.flops import mfu, peak_bf16_flops
from kempnerforge.telemetry.sinks import Row, SinkSet
from kempnerforge.telemetry.spans import Spans

# Spans


def test_spans_add_up_nest_and_start_again() -> None:
    spans = Spans("cpu")
    with spans.span("step"):
        for _ in range(2):
            with spans.span("forward_backward"):
                time.sleep(0.02)
        with spans.span("optimizer", host=True):
            time.sleep(0.01)
    seconds = spans.collect()
    assert list(seconds) == ["time/forward_backward_s", "time/optimizer_s", "time/step_s"]
    assert 0.04 <= seconds["time/forward_backward_s"] < 0.5
    assert 0.01 <= seconds["time/optimizer_s"] < 0.5
    assert seconds["time/step_s"] >= seconds["time/forward_backward_s"] + seconds["time/optimizer_s"]
    assert spans.collect() == {}


def test_a_span_that_raises_is_timed_and_lets_the_error_out() -> None:
    spans = Spans("cpu")
    with pytest.raises(KeyError), spans.span("data"):
        raise KeyError
    assert list(spans.collect()) == ["time/data_s"]


def test_cuda_spans_time_the_device_without_waiting_for_it() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spans = Spans("cuda")
    for _ in range(2):  # the second round uses the events of the first again
        start_s = time.perf_counter()
        with spans.span("forward_backward"):
            torch.cuda._sleep(200_000_000)
        queued_s = time.perf_counter() - start_s
        with spans.span("data", host=True):
            time.sleep(0.01)
        torch.cuda.synchronize()
        seconds = spans.collect()
        assert seconds["time/forward_backward_s"] > 0.05
        assert queued_s < 0.5 * seconds["time/forward_backward_s"]
        assert 0.01 <= seconds["time/data_s"] < 0.05


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
def test_peak_flops_by_name(name: str, peak: float | None) -> None:
    assert peak_bf16_flops(name) == peak


def test_mfu_of_a_known_case() -> None:
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


def test_every_sink_gets_every_row_with_the_same_time() -> None:
    log: list[Any] = []
    sinks = SinkSet([ListSink(log, "a"), ListSink(log, "b")])
    row = {"step": 1}
    sinks.write(row)
    sinks.write({"step": 2, "time": 5.0})
    assert row == {"step": 1}
    (_, first), (_, second) = log[:2]
    assert first == second
    assert abs(first["time"] - time.time()) < 60
    assert log[2:] == [("a", {"step": 2, "time": 5.0}), ("b", {"step": 2, "time": 5.0})]


def test_closing_reaches_all_sinks_and_tells_of_the_error() -> None:
    log: list[Any] = []
    sinks = SinkSet([ListSink(log, "a"), ListSink(log, "b", fail_on_close=True)])
    with pytest.raises(OSError, match="b"):
        sinks.close()
    assert log == [("b", "closed"), ("a", "closed")]


def test_an_empty_set_takes_rows() -> None:
    sinks = SinkSet()
    sinks.write({"step": 1})
    sinks.close()
