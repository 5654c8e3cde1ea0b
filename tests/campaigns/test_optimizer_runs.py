"""Runs with each optimizer of a config: killed, resumed on the same layout and on one process.

    python -m pytest -m slow tests/campaigns/test_optimizer_runs.py                     # all of it
    KEMPNERFORGE_SEED=7 python -m pytest tests/campaigns/test_optimizer_runs.py         # another slice

A run whose ranks are all killed at a random step and that resumes must have the bits of one that
was never stopped. On one process it must load the bits of the checkpoint, and train as the other.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ckpt_cli import Ckpt
from support.patch_target import patch_target
from support.run_files import tensor_digests
from support.runs import Launcher, Run, copy_run, make_run
from support.weight_cases import process, weights_of

from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.config.schema import load_job
from kempnerforge.model.hf import tensor_map

pytest_plugins = ["support.ckpt_fixtures", "support.run_fixtures"]

UPDATE = patch_target("kempnerforge.train.step:TrainStepBase.update")
TORCH_NADAM = patch_target("torch.optim:NAdam")
STEPS = 9
SEED = int(os.environ.get("KEMPNERFORGE_SEED", "12"))
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {},
    "lion": {"optimizer.lr": 3e-4},
    "schedule_free_adamw": {},
    "adafactor": {},
    "sgd": {"optimizer.args.momentum": 0.9, "optimizer.lr": 0.1},
    TORCH_NADAM: {},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "fsdp2": (2, {}),
    "tp2": (2, {"distributed.tp": 2}),
    "pp2": (2, {"distributed.pp": 2}),
    "pp2 tp2": (4, {"distributed.pp": 2, "distributed.tp": 2}),
}
CASES = list(itertools.product(OPTIMIZERS, LAYOUTS))


def settings_of(name: str, layout: str) -> dict[str, Any]:
    return {
        "train.max_steps": STEPS,
        "checkpoint.interval": 2,
        "checkpoint.keep_last_n": STEPS,
        "eval.interval": 3,
        "scheduler.name": "cosine",
        "optimizer.name": name,
        **OPTIMIZERS[name],
        **LAYOUTS[layout][1],
    }


def check(launcher: Launcher, corpus: Path, folder: Path, name: str, layout: str) -> Run:
    ranks, _ = LAYOUTS[layout]
    whole = make_run(folder / "whole", corpus, **settings_of(name, layout))
    launcher.finish(whole, ranks=ranks)
    run = make_run(folder / "killed", corpus, **settings_of(name, layout))
    kill_at = random.Random(f"{SEED}:{name}:{layout}").randint(4, STEPS)
    died = launcher.run(run, ranks=ranks, faults=[("kill_job_at_call", {"target": UPDATE, "call": kill_at})])
    assert set(died.statuses) == {-9}, died.output
    elsewhere = copy_run(run, folder / "elsewhere")
    launcher.finish(run, ranks=ranks)
    assert run.receipts()[-1]["step"] > 0
    assert run.counting() == whole.counting()
    assert tensor_digests(run.step_folder(STEPS)) == tensor_digests(whole.step_folder(STEPS))
    if ranks > 1:
        report = folder / "loaded"
        faults = [("report_loaded", {"path": str(report)})]
        ended = launcher.run(elsewhere, "--distributed.tp=1", "--distributed.pp=1", faults=faults)
        assert ended.statuses == [0], ended.output
        step = elsewhere.receipts()[-1]["step"]
        stored = tensor_digests(elsewhere.step_folder(step))
        loaded = json.loads(Path(f"{report}.rank_0.json").read_text())
        assert loaded == {key: digest for key, digest in stored.items() if not key.startswith("rng.")}
        for number, row in whole.counting().items():
            for key in ("train/loss", "eval/loss"):
                if key in row:
                    assert elsewhere.counting()[number][key] == pytest.approx(row[key], rel=1e-3)
    return whole


def sample(count: int) -> list[tuple[str, str]]:
    return random.Random(SEED).sample(CASES, count)


def test_run_with_muon_killed_and_resumed_has_same_bits(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    check(launcher, corpus, tmp_path, "muon", "fsdp2")


@pytest.mark.parametrize(("name", "layout"), sample(4))
def test_run_of_some_optimizers_resumes_with_same_bits(
    launcher: Launcher, corpus: Path, tmp_path: Path, name: str, layout: str
) -> None:
    check(launcher, corpus, tmp_path, name, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_run_of_each_optimizer_resumes_with_same_bits(
    launcher: Launcher, corpus: Path, tmp_path: Path, name: str, layout: str
) -> None:
    check(launcher, corpus, tmp_path, name, layout)


def test_run_with_schedule_that_fails_late_ends_with_2(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    name = "lab_schedules:late"
    run = make_run(tmp_path, corpus, **{"scheduler.name": name, "scheduler.warmup_steps": None})
    (tmp_path / "lab_schedules.py").write_text(
        "def late(step, max_steps):\n    return float('nan') if step == 5 else 1.0\n"
    )
    ended = launcher.run(run, ranks=2)
    assert ended.statuses == [2, 2], ended.output
    assert ended.output.count(f'scheduler.name: "{name}" returned nan at step 5') == 1
    assert run.committed() == [4]
    (tmp_path / "lab_schedules.py").write_text("def late(step, max_steps):\n    return 1.0\n")
    launcher.finish(run, ranks=2)


@pytest.mark.parametrize("layout", ["1", "fsdp2", "tp2"])
def test_schedule_free_run_is_evaluated_and_exported_as_average(
    launcher: Launcher, ckpt: Ckpt, corpus: Path, tmp_path: Path, layout: str
) -> None:
    """``eval`` computes the loss that training logged. ``export`` and ``generate`` use the same weights."""
    ranks, _ = LAYOUTS[layout]
    run = make_run(tmp_path / "run", corpus, **settings_of("schedule_free_adamw", layout))
    launcher.finish(run, ranks=ranks)
    step = run.step_folder(STEPS)
    ended = launcher.run(run, ranks=ranks, command=["eval", str(step), "--json"])
    found = json.loads(ended.outputs[0][ended.outputs[0].index("{") :])
    assert found["eval/loss"] == run.counting()[STEPS]["eval/loss"]

    average = {
        name: weight.lerp(z, 1 - 1 / 0.9)
        for (name, weight), z in zip(weights_of(step).items(), z_of(step), strict=True)
    }
    done = ckpt("export", step, "--out", tmp_path / "hf", "--max-shard-size", "30KB")
    assert (done.status, done.err) == (0, "")
    assert "these are the evaluation weights of ScheduleFreeAdamW" in done.out
    exported = {k: v for file in (tmp_path / "hf").glob("*.safetensors") for k, v in load_file(file).items()}
    for tensor in tensor_map(load_job(step / "config.toml").job.model):
        # Rows of some matrices are exchanged for transformers' rotary embedding.
        there, here = (
            values.sort(dim=0).values for values in (exported[tensor.hf_name], average[tensor.name])
        )
        torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-7)

    code = GENERATE.format(path=str(tmp_path / "generated.pt"))
    generated = process("generate", step, "--prompt", "a", code=code)
    assert generated.returncode == 0, generated.stderr
    torch.testing.assert_close(torch.load(tmp_path / "generated.pt"), average, rtol=1e-6, atol=1e-7)


GENERATE = """
import torch
import kempnerforge.train.generation as generation

def keep_weights(model, *_args, **_options):
    torch.save({{name: p.detach().full_tensor() for name, p in model.named_parameters()}}, {path!r})

generation.continue_prompt = keep_weights
"""


def z_of(step: Path) -> list[torch.Tensor]:
    """The state z of all parameters, in the order of their names."""
    reader = SafetensorsReader(step)
    found = {name: torch.empty(entry.shape) for name, entry in reader.index.items() if name.endswith(".z")}
    load_tensors(found, reader)
    reader.close()
    return [found[f"optimizer.state.{name}.z"] for name in weights_of(step)]
