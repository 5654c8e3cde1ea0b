"""The parts of hooks, sinks, profiles and memory metrics that need no run."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kempnerforge import Hook, plugins
from kempnerforge.checkpoint.state import rng_state
from kempnerforge.config.hooks import METHODS, method_issues
from kempnerforge.config.job import validate_tree
from kempnerforge.config.plugin_uses import plugin_issues
from kempnerforge.config.schema import JobConfig, load_job
from kempnerforge.goodput.faults import is_peer_loss
from kempnerforge.telemetry.memory import PeakMemory
from kempnerforge.telemetry.sinks import RunInfo
from kempnerforge.train.out_of_memory import DeviceMemory, MemoryHolders, describe
from kempnerforge.train.profile_request import ProfileRequest, parse

CPU = torch.device("cpu")
JOB = {"data": {"text": "python-stdlib"}}


def job(**sections: Any) -> JobConfig:
    made, issues = validate_tree({**JOB, **sections})
    assert made is not None, issues
    return made


# Hooks and sinks in a config


def test_hook_methods_are_those_that_a_config_knows() -> None:
    assert sorted(METHODS) == sorted(name for name in dir(Hook) if name.startswith("on_"))


def test_hook_with_misspelt_method_is_refused() -> None:
    class Ends(Hook):
        def on_step_ends(self, step: int, metrics: Any) -> None: ...

    assert [str(issue) for issue in method_issues(Ends, "hooks[0].name")] == [
        "hooks[0].name: the hook's method on_step_ends would never be called; did you mean on_step_end?"
    ]
    [nothing] = method_issues(object(), "hooks[0].name")
    assert "the hook has no method that would be called" in str(nothing)
    assert method_issues(Hook(), "hooks[0].name") == []


def test_hook_and_sink_tables_round_trip(tmp_path: Path) -> None:
    made = job(
        hooks=[{"name": "a:B", "args": {"x": [1]}, "on_error": "warn"}, {"name": "c:D"}],
        metrics={"sinks": [{"name": "tensorboard", "args": {"log_dir": "tb"}}]},
    )
    (tmp_path / "again.toml").write_text(made.to_toml())
    assert load_job(tmp_path / "again.toml").job == made
    _, issues = validate_tree({**JOB, "hooks": [{"name": "a:B", "on_error": "skip", "arg": {}}]})
    assert sorted(issue.key for issue in issues) == ["hooks[0].arg", "hooks[0].on_error"]


def test_config_check_covers_hooks_and_own_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(hooks=[{"name": "absent_hooks:B"}], metrics={"sinks": [{"name": "tensorbord"}]})
    sink, hook = plugin_issues(made)
    assert str(sink).startswith(
        'metrics.sinks[0].name: "tensorbord" is not a known sink; did you mean "tensorboard"?'
    )
    assert (hook.key, "there is no module absent_hooks" in hook.problem) == ("hooks[0].name", True)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("tensorboard.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "kempnerforge.telemetry.plugin_sinks.tensorboard", raising=False)
    [missing] = plugin_issues(job(metrics={"sinks": [{"name": "tensorboard"}]}))
    assert str(missing) == (
        'metrics.sinks[0].name: "tensorboard" needs the package tensorboard, which is not installed; '
        "pip install 'kempnerforge[tensorboard]'"
    )


def test_config_check_tensorboard_argument_is_checked() -> None:
    pytest.importorskip("tensorboard")
    [issue] = plugin_issues(job(metrics={"sinks": [{"name": "tensorboard", "args": {"logdir": "x"}}]}))
    assert issue.key == "metrics.sinks[0].args.logdir"


def test_hook_error_is_no_loss_of_a_peer() -> None:
    text = "hook a:B: on_step_end raised ConnectionError: connection refused (rank 0, b.py:3)"
    assert not is_peer_loss("HookError", text)
    assert is_peer_loss("RuntimeError", text)


def test_rng_fork_restores_every_generator() -> None:
    before = rng_state.capture(CPU)

    drawn = []

    def draw_and_raise(key: str) -> None:
        with rng_state.forked(key, CPU):
            drawn.append([random.random(), float(np.random.rand()), torch.rand(1).item()])
            raise ZeroDivisionError

    for key in ("a", "a", "b"):
        with pytest.raises(ZeroDivisionError):
            draw_and_raise(key)
    assert torch.equal(rng_state.capture(CPU), before)
    assert drawn[0] == drawn[1] != drawn[2]


def test_tensorboard_resume_hides_repeated_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tensorboard = plugins.resolve("sink", "tensorboard", key="metrics.sinks[0].name")
    for attempt, began, ended in ((1, 0, 7), (2, 4, 9)):
        sink = tensorboard.target()
        sink.start(RunInfo(job(), tmp_path, "id", attempt, began, rank=0, num_ranks=1))
        for step in range(began + 1, ended + 1):
            sink.write({"step": step, "time": 5.0, "train/loss": attempt + step, "data/digest": "x"})
        sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    expected = [(step, 1 + step if step <= 4 else 2 + step) for step in range(1, 10)]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected


# Profiles


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("", ProfileRequest(3, (0,))),
        ("5", ProfileRequest(5, (0,))),
        ("2 all", ProfileRequest(2, (0, 1, 2, 3))),
        (" 1  3, 0,3", ProfileRequest(1, (0, 3))),
    ],
)
def test_profile_request_is_parsed(text: str, request_: ProfileRequest) -> None:
    assert parse(text, 4) == request_


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("many", "write a number of steps"),
        ("3 0-2", "write a number of steps"),
        ("-1", "write a number of steps"),
        ("0", "0 steps: allowed are 1 to 100"),
        ("101", "101 steps"),
        ("3 1,4", "there is no rank 4: the last one is 3"),
    ],
)
def test_profile_request_that_is_none_says_why(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(text, 4)


# Memory


def test_host_peak_is_that_since_last_row() -> None:
    peak = PeakMemory(CPU)
    before = peak.collect()["memory/host_peak_bytes"]
    block = bytearray(b"x") * (96 << 20)
    block.clear()
    after = peak.collect()["memory/host_peak_bytes"]
    assert after - before > 64 << 20
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this kernel cannot reset the peak")
    assert after - peak.collect()["memory/host_peak_bytes"] > 64 << 20


def test_out_of_memory_line_adds_up_made_up_tensors() -> None:
    model = nn.Sequential(nn.Embedding(1 << 16, 16), nn.Linear(16, 4, bias=False))
    model[1].weight.grad = torch.ones(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    optimizer.step()
    measured = MemoryHolders([model], [optimizer]).measure()
    # Adam's step counter, 4 bytes, and two moments.
    assert measured["1"] == {"parameters": 256, "gradients": 256, "optimizer state": 4 + 2 * 256}
    assert measured["0"] == {"parameters": 4 << 20, "gradients": 0, "optimizer state": 0}
    memory = DeviceMemory(allocated=3 << 30, reserved=4 << 30, free=1 << 20, total=5 << 30)
    assert describe(measured, memory) == (
        "3.00 GiB allocated, 4.00 GiB reserved, 1.00 MiB free of 5.00 GiB; parameters 4.00 MiB, gradients "
        "0.00 MiB, optimizer state 0.00 MiB, the rest (activations, gathered weights, temporary tensors) "
        "3.00 GiB; largest modules: 0 4.00 MiB, 1 0.00 MiB"
    )


def test_out_of_memory_shared_memory_is_counted_once() -> None:
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    measured = MemoryHolders([first, second], []).measure()
    assert sum(kinds["parameters"] for kinds in measured.values()) == 4 * 64
