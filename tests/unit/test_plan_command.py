"""``kempnerforge plan`` as a user meets it, and its agreement with ``kempnerforge config check``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kempnerforge.cli.app import main
from kempnerforge.config.schema import load_job
from kempnerforge.errors import ConfigError
from kempnerforge.plan.layout_suggestions import nearest_layouts

ROOT = Path(__file__).parents[2]
LLAMA = str(ROOT / "configs" / "llama_7b.toml")
FREE = ["--distributed.dp_replicate=1", "--distributed.dp_shard=-1"]


class Output:
    """What a command said."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status, self.stdout, self.stderr = status, stdout, stderr


def kempnerforge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> Output:
    monkeypatch.setattr(sys, "argv", ["kempnerforge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    status = ended.value.code
    assert isinstance(status, int)
    printed = capsys.readouterr()
    return Output(status, printed.out, printed.err)


def test_plan_json_reports_layout_and_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", LLAMA, "--world-size", 32, "--json", "--memory-gb=80", "--ranks-per-node=4"]
    output = kempnerforge(monkeypatch, capsys, *arguments)
    assert output.status == 0, output.stderr
    body = json.loads(output.stdout)
    assert body["mesh"] == {"pp": 1, "dp_replicate": 4, "dp_shard": 8, "tp": 1}
    assert body["groups"]["dp_replicate"][0] == [0, 8, 16, 24]
    assert (body["possible"], body["fits"]) == (True, True)
    [place] = body["pipeline"]
    assert place["parameters"] == 6_738_415_616 // 8
    assert body["staged_on_node_bytes"] == 4 * place["staged_bytes"]
    assert body["device_bytes"] == place["memory"]["total"]
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "buffers", "working")
    assert sum(place["memory"][part] for part in parts) == body["device_bytes"]


def test_plan_device_too_small_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = kempnerforge(monkeypatch, capsys, "plan", LLAMA, "--world-size=32", "--memory-gb=40")
    assert output.status == 1
    assert "does not fit: " in output.stdout


def test_plan_host_memory_above_limit_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for limit, is_said in ((10, True), (30, False)):
        arguments = ["plan", LLAMA, "--world-size=32", f"--checkpoint.max_host_memory_gb={limit}"]
        output = kempnerforge(monkeypatch, capsys, *arguments)
        assert ("the run would not start" in output.stdout) == is_said


def test_plan_names_cheaper_loss_of_large_vocabulary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chunked = "--train.loss=chunked_cross_entropy"
    large = ["plan", LLAMA, "--world-size=8", *FREE, "--model.vocab_size=128256"]
    shown = kempnerforge(monkeypatch, capsys, *large).stdout
    assert "train.loss chunked_cross_entropy would need " in shown
    plain, other = (
        json.loads(kempnerforge(monkeypatch, capsys, *large, *extra, "--json").stdout)
        for extra in ([], [chunked])
    )
    assert plain["cheaper_loss"] == {"name": "chunked_cross_entropy", "device_bytes": other["device_bytes"]}
    assert other["device_bytes"] < plain["device_bytes"]
    assert other["cheaper_loss"] is None
    small = ["plan", LLAMA, "--world-size=8", *FREE, "--model.vocab_size=257", "--train.batch_size=1"]
    assert "would need" not in kempnerforge(monkeypatch, capsys, *small).stdout


TP3 = ["--distributed.tp=3"]
LAYOUTS = [
    (overrides, world_size)
    for overrides in (
        [],
        FREE,
        [*FREE, "--distributed.tp=2"],
        [*FREE, *TP3],
        [*FREE, "--distributed.tp=64"],
        [*FREE, "--distributed.pp=2"],
        [*FREE, "--distributed.pp=40"],
        [*FREE, "--distributed.pp=4", "--distributed.pp_schedule=interleaved_1f1b"],
        [*FREE, "--distributed.pp=32", "--distributed.pp_schedule=interleaved_1f1b"],
        [*FREE, "--distributed.pp=2", "--distributed.pp_layers=[15,17]"],
        [*FREE, "--distributed.pp=4", "--distributed.pp_layers=[15,17]"],
        [*FREE, "--distributed.pp_schedule=gpipe"],
        [*FREE, "--distributed.pp=2", "--distributed.pp_microbatch_size=3"],
        [*FREE, "--distributed.tp=2", "--distributed.pp=2", "--model.tie_embeddings=true"],
        ["--distributed.dp_replicate=2", "--distributed.tp=2"],
        ["--distributed.dp_replicate=3", "--distributed.dp_shard=-1"],
    )
    for world_size in (1, 3, 8, 32, 64)
]


@pytest.mark.parametrize(("overrides", "world_size"), LAYOUTS)
def test_plan_agrees_with_config_check(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    world_size: int,
) -> None:
    """And the nearest layouts that it names are possible."""
    arguments = [LLAMA, *overrides, f"--world-size={world_size}"]
    planned = kempnerforge(monkeypatch, capsys, "plan", *arguments)
    checked = kempnerforge(monkeypatch, capsys, "config", "check", *arguments, "--no-files")
    assert planned.status == checked.status
    if checked.status == 0:
        return
    assert checked.status == 2
    assert planned.stdout == ""
    assert planned.stderr.startswith(checked.stderr)
    near = nearest_layouts(LLAMA, overrides, world_size)
    for change in near.overrides:
        assert " ".join(change) in planned.stderr
        job = load_job(LLAMA, [*overrides, *change], world_size=world_size, inside_job=False).job
        assert job.geometry(world_size).world_size == world_size
    for size in near.world_sizes:
        assert size != world_size
        assert load_job(LLAMA, overrides, world_size=size, inside_job=False).job.geometry(size)
    assert near.overrides or near.world_sizes or world_size == 3, "nothing is near"


@pytest.mark.parametrize(
    ("overrides", "world_size", "first", "sizes"),
    [
        ([*FREE, *TP3], 32, ("--distributed.tp=4",), ()),
        ([*FREE, "--distributed.tp=64"], 64, ("--distributed.tp=32",), ()),
        ([], 16, ("--distributed.dp_replicate=2",), (32,)),
        ([*FREE, "--distributed.pp=64"], 64, ("--distributed.pp=32",), ()),
        ([*FREE, "--distributed.tp=8"], 12, ("--distributed.tp=4", "--distributed.pp=3"), (8, 16)),
        ([*FREE, "--distributed.pp_schedule=gpipe"], 8, ("--distributed.pp_schedule=1f1b",), ()),
    ],
)
def test_nearest_layouts_table_matches(
    overrides: list[str], world_size: int, first: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    near = nearest_layouts(LLAMA, overrides, world_size)
    assert (near.overrides[0] if near.overrides else ()) == first
    assert near.world_sizes[: len(sizes)] == sizes


def test_plan_other_fault_gets_no_layouts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = kempnerforge(
        monkeypatch, capsys, "plan", LLAMA, "--optimizer.lr=x", *TP3, "--world-size=8", "--json"
    )
    assert output.status == 2
    body = json.loads(output.stdout)
    assert body["possible"] is False
    assert {fault["key"] for fault in body["faults"]} >= {"optimizer.lr", "distributed.tp"}
    assert body["nearest"] == {"overrides": [], "world_sizes": []}
    with pytest.raises(ConfigError):
        load_job(LLAMA, ["--optimizer.lr=x"])


@pytest.mark.parametrize(
    "arguments", [["plan"], ["plan", LLAMA], ["plan", "--train.seed=1", "--world-size=2"]]
)
def test_plan_wrong_usage_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    output = kempnerforge(monkeypatch, capsys, *arguments)
    assert output.status == 2
    assert "Usage:" in output.stderr


def test_plan_missing_file_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = kempnerforge(monkeypatch, capsys, "plan", tmp_path / "none.toml", "--world-size=2")
    assert output.status == 2
    assert "does not exist" in output.stderr
    assert "possible" not in output.stderr
