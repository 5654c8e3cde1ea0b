"""Every configuration in configs/ is valid, and what its comments claim is true."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kempnerforge.config.reference import json_schema
from kempnerforge.config.schema import AsyncCheckpointMode, load_job
from kempnerforge.plan.report import make_plan

pytestmark = pytest.mark.smoke

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.toml"))

PUBLISHED = {"llama_7b": 6_738_415_616, "llama_13b": 13_015_864_320, "llama_70b": 68_976_648_192}
LATER = {"llama_1b": 1_235_814_400, "llama_8b": 8_030_261_248}
"""Llama 3.2 1B and Llama 3 8B, as published."""
BYTES_PER_PARAMETER = 4 + 4 + 8
"""fp32 weight, fp32 gradient, and AdamW's two fp32 moments."""
GPUS_PER_NODE = 8


def stated_world_size(file: Path) -> int:
    found = re.match(r"#:schema \./schema\.json\n# World size: (\d+)", file.read_text())
    assert found, f"{file} does not begin with its schema and its world size"
    return int(found[1])


def test_configs_promised_files_exist() -> None:
    assert {"quickstart", "debug", *PUBLISHED} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_valid_at_stated_world_size(file: Path) -> None:
    world_size = stated_world_size(file)
    geometry = load_job(file, world_size=world_size).job.geometry(world_size)
    assert geometry.world_size == world_size


MEMORY = re.compile(
    r"^# `kempnerforge plan`, GB a GPU at the peak: ([\d.]+) state \+ ([\d.]+) gathered \+"
    r" ([\d.]+) activations \+\n# ([\d.]+) buffers \+ ([\d.]+) working = ([\d.]+) of (\d+)\.$",
    re.MULTILINE,
)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("llama_*.toml")), ids=lambda file: file.stem)
def test_llama_config_stated_memory_matches_plan_and_fits(file: Path) -> None:
    text, world_size = file.read_text(), stated_world_size(file)
    plan = make_plan(load_job(file, world_size=world_size).job, world_size)
    stated = MEMORY.search(text)
    assert stated, "the comment does not say what plan says"
    most = max((place.memory for place in plan.pipeline), key=lambda memory: memory.total)
    state = most.weights + most.gradients + most.optimizer
    planned = [state, most.gathered, most.activations, most.buffers, most.working, most.total]
    assert list(stated.groups()[:6]) == [f"{size / 1e9:.1f}" for size in planned]
    assert f"H100-{stated[7]}GB" in text.splitlines()[1]
    assert plan.fits(float(stated[7]))


def test_configs_cover_tensor_and_pipeline_parallelism() -> None:
    """On 2 to 32 GPUs there is a config for each, and one for both."""
    used = set()
    for file in FILES:
        world_size = stated_world_size(file)
        geometry = load_job(file).job.geometry(world_size)
        if 2 <= world_size <= 32:
            used.add((geometry.tp > 1, geometry.pp > 1, geometry.dp_shard > 1))
    assert used >= {(True, False, True), (False, True, True), (True, True, False), (False, False, True)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_llama_config_matches_its_comment(name: str) -> None:
    file = FOLDER / f"{name}.toml"
    text, job = file.read_text(), load_job(file).job
    world_size = stated_world_size(file)
    geometry = job.geometry(world_size)
    assert job.model.num_parameters == PUBLISHED[name]

    nodes = re.search(r"\((\d+) nodes x 8 H100-80GB\)", text)
    assert nodes
    assert int(nodes[1]) * GPUS_PER_NODE == world_size

    stated = re.search(r"([\d,]+) x 16 / (\d+) = ([\d.]+) GB per GPU", text)
    assert stated, "the comment does not work the memory out"
    assert int(stated[1].replace(",", "")) == job.model.num_parameters
    assert int(stated[2]) == geometry.dp_shard
    state_gb = job.model.num_parameters * BYTES_PER_PARAMETER / geometry.dp_shard / 1e9
    assert float(stated[3]) == pytest.approx(state_gb, abs=0.05)
    assert state_gb < 40, "leaves no room for activations in 80 GB"

    tokens = geometry.global_batch_size * job.train.seq_len
    assert tokens == pytest.approx(4e6, rel=0.1)


@pytest.mark.parametrize("name", LATER)
def test_llama3_config_has_published_size(name: str) -> None:
    assert load_job(FOLDER / f"{name}.toml").job.model.num_parameters == LATER[name]


@pytest.mark.parametrize(
    ("name", "overrides", "world_size"),
    [
        ("quickstart", [], 1),
        ("quickstart", ["--train.batch_size=4"], 4),
        ("debug", [], 2),
        ("debug", [], 4),
        ("llama_1b_tp2_pp2", [], 8),
        ("llama_1b_tp2_pp2", [], 16),
    ],
)
def test_config_promised_other_world_sizes_are_valid(
    name: str, overrides: list[str], world_size: int
) -> None:
    job = load_job(FOLDER / f"{name}.toml", overrides, world_size=world_size).job
    assert job.geometry(world_size).world_size == world_size


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_saves_in_the_background(file: Path) -> None:
    assert load_job(file).job.checkpoint.async_mode is AsyncCheckpointMode.async_pinned


# Editors


needs_taplo = pytest.mark.skipif(
    shutil.which("taplo") is None, reason="no taplo here; the extra `dev` installs it"
)


def taplo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["taplo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER)


def test_configs_schema_file_is_current() -> None:
    """If not: ``kempnerforge config schema > configs/schema.json``."""
    assert json.loads((FOLDER / "schema.json").read_text()) == json_schema()


@needs_taplo
def test_configs_pass_a_toml_formatter_and_schema() -> None:
    formatted = taplo("fmt", "--check", *FILES)
    assert formatted.returncode == 0, formatted.stderr
    linted = taplo("lint", *FILES)
    assert linted.returncode == 0, linted.stderr


@needs_taplo
def test_config_schema_line_reports_a_misspelled_key(tmp_path: Path) -> None:
    """The line works: an editor that follows it marks a key that ``config check`` would refuse."""
    shutil.copy(FOLDER / "schema.json", tmp_path)
    file = tmp_path / "quickstart.toml"
    file.write_text((FOLDER / "quickstart.toml").read_text().replace("max_steps", "max_stepz"))
    linted = taplo("lint", file)
    assert linted.returncode != 0
    assert "'max_stepz' was unexpected" in linted.stderr
