"""Sweeps, resources and the job step, without SLURM; and the configs that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kempnerforge.config.packaged import FOLDER, packaged_config, packaged_names
from kempnerforge.config.schema import load_job
from kempnerforge.errors import ConfigError, RunFolderError
from kempnerforge.slurm.job import SlurmError
from kempnerforge.slurm.resources import Resources, gpus_in_gres
from kempnerforge.slurm.step import this_step
from kempnerforge.slurm.sweep import Sweep, make_sweep, read_sweep, write_sweep

CONFIGS = Path(__file__).parents[2] / "configs"


def sweep(*options: str) -> Sweep:
    return make_sweep(options, file="run.toml", overrides=["--train.seed=1"], folder="runs/s", run_name="s")


def test_sweep_is_product_of_its_keys() -> None:
    made = sweep("optimizer.lr=[1e-4, 3e-4]", '--scheduler.name=["cosine", "wsd"]')
    assert [cell.description for cell in made.cells] == [
        'optimizer.lr=0.0001, scheduler.name="cosine"',
        'optimizer.lr=0.0001, scheduler.name="wsd"',
        'optimizer.lr=0.0003, scheduler.name="cosine"',
        'optimizer.lr=0.0003, scheduler.name="wsd"',
    ]
    assert made.cells[2].arguments == [
        "--optimizer.lr=0.0003",
        '--scheduler.name="cosine"',
        "--run.name=s-2",
        "--run.dir=runs/s/2",
    ]
    nested = sweep("optimizer.betas=[[0.9, 0.95], [0.9, 0.99]]")
    assert load_job(None, ["--data.text=python-stdlib", *nested.cells[1].overrides]).job.optimizer.betas == (
        0.9,
        0.99,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["optimizer.lr=1e-4"], "has no list of values"),
        (["optimizer.lr"], "has no list of values"),
        (["optimizer.lr=[]"], "has no list of values"),
        (["scheduler.name=[cosine]"], "with quotes around texts"),
        (["train.seed=[1]", "train.seed=[2]"], "train.seed is given twice"),
        (['run.name=["a"]'], "run.name cannot be swept"),
        ([f"train.seed={list(range(1001))}"], "1001 runs"),
    ],
)
def test_sweep_invalid_option_is_refused(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sweep(*options)


def test_sweep_folder_holds_one_sweep_and_no_run(tmp_path: Path) -> None:
    first = sweep("train.seed=[1,2]")
    write_sweep(tmp_path / "s", first)
    write_sweep(tmp_path / "s", first)
    assert read_sweep(tmp_path / "s") == first
    with pytest.raises(RunFolderError, match="has another sweep"):
        write_sweep(tmp_path / "s", sweep("train.seed=[1,3]"))
    (tmp_path / "run.json").touch()
    with pytest.raises(RunFolderError, match="is the folder of a run"):
        write_sweep(tmp_path, first)
    (tmp_path / "s/sweep.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"sweep.json cannot be read"):
        read_sweep(tmp_path / "s")


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:8", 8),
        ("gpu:h100:4", 4),
        ("gpu", 1),
        ("gpu:h100", 1),
        ("lustre:1,gpu:a100:2(S:0-1)", 2),
        ("gpu:a:1,gpu:b:2", 3),
        ("lustre:1", None),
        ("", None),
    ],
)
def test_gres_gpus_counted(gres: str, gpus: int | None) -> None:
    assert gpus_in_gres(gres) == gpus


@pytest.mark.parametrize(
    ("given", "gpus", "options"),
    [
        ({}, 1, ["--gpus-per-node=1"]),
        ({"gpus_per_node": 0, "mem": "0"}, 0, ["--mem=0"]),
        ({"gres": "gpu:h100:8", "cpus_per_task": 64}, 8, ["--gres=gpu:h100:8", "--cpus-per-task=64"]),
        ({"gpus_per_node": 2, "gres": "lustre:1"}, 2, ["--gpus-per-node=2", "--gres=lustre:1"]),
    ],
)
def test_resources_become_sbatch_options(given: dict[str, Any], gpus: int, options: list[str]) -> None:
    resources = Resources(**given)
    resources.check([])
    assert (resources.gpus, resources.options) == (gpus, options)


def test_resources_invalid_or_given_twice_are_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        Resources(gpus_per_node=1, gres="lustre;x", mem="2 GB", cpus_per_task=4).check(["-c", "8"])
    assert [fault.key for fault in refused.value.faults] == ["--mem", "--gres", "--cpus-per-task"]
    with pytest.raises(ConfigError, match="--gpus-per-node too"):
        Resources(gpus_per_node=1, gres="gpu:2").check([])
    assert Resources().has_cpus(["--exclusive"])
    assert Resources().has_cpus(["-c8"])
    assert not Resources().has_cpus(["--partition=cpu"])


STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "n[3-6]",
}


def test_job_step_from_environment() -> None:
    assert this_step({}) is None
    assert this_step({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is None  # the shell of a batch script
    assert this_step(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    step = this_step(STEP)
    assert step is not None
    assert (step.num_nodes, step.task, step.first_node) == (4, 2, "n3")
    later = this_step(STEP | {"SLURM_RESTART_COUNT": "1"})
    assert later is not None
    assert not set(later.ports) & set(step.ports)
    assert all(20000 <= port < 32000 for port in step.ports)
    with_secret = this_step(STEP | {"KEMPNERFORGE_LINK_SECRET": "s3cr3t"})
    assert with_secret is not None
    assert len({step.key, later.key, with_secret.key}) == 3
    assert b"s3cr3t" in with_secret.key
    assert "s3cr3t" not in repr(with_secret)
    with pytest.raises(SlurmError, match="variables of this job step"):
        this_step(STEP | {"SLURM_STEP_ID": "batch"})


def test_packaged_configs_are_those_of_the_repository() -> None:
    assert FOLDER.resolve() == CONFIGS.resolve()
    assert packaged_names() == sorted(path.stem for path in CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_config_stands_alone(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.toml"
    file.write_text(packaged_config(name))
    assert "extends" not in file.read_text().split("[", 1)[1]
    assert file.read_text().startswith("# World size:")
    assert load_job(file).job == load_job(CONFIGS / file.name).job
