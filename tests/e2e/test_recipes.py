"""The programs of docs/guide/recipes.md as they stand there: killed, resumed, and every bit compared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.dtypes import DTYPES
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "recipes.md"
BLOCK = re.compile(r"(?:`(\w+\.py)`:\n\n)?^```python\n(.*?)^```$", re.M | re.S)
ADVANCE = re.compile(r"^( +)((?:self\.)?)state\.advance\(\)\n", re.M)
KILL = r"\g<0>\1\2ckpt.wait()  # the saves before this step are committed: it is known what is resumed" + (
    "\n\\1if \\2state.step == {step}: import os; os.kill(os.getpid(), 9)\n"
)
MAX_LINES, MAX_SHARED_LINES = 25, 35
LAST = 50


@dataclass(frozen=True)
class Recipe:
    heading: str
    run_dir: str
    library: str = "torch"
    ranks: int = 1
    check: str = ""
    """Code at the end of the program."""
    depends_on_save: bool = False
    """Whether what is saved depends on when within a step it is saved."""


PLAIN = Recipe("Plain loop", "runs/plain")
DDP = Recipe("DistributedDataParallel", "runs/ddp", ranks=2)
FSDP1 = Recipe("FSDP1", "runs/fsdp1", ranks=2)
COMPILE = Recipe(
    "torch.compile",
    "runs/compiled",
    check="assert not any(name.startswith('_orig_mod') for name in plain.state_dict())\n"
    "for name, value in plain.state_dict().items():\n"
    "    assert torch.equal(value, model.state_dict()['_orig_mod.' + name]), name\n"
    "print('the plain model has the weights')\n",
)
ACCELERATE = Recipe("accelerate", "runs/accelerate", library="accelerate")
# At the end of a batch Lightning has not counted the batch as completed; at the end of training it has.
LIGHTNING = Recipe("Lightning", "runs/lightning", library="lightning", depends_on_save=True)
TRAINER = Recipe("Trainer of transformers", "runs/trainer", library="transformers")
RECIPES = [PLAIN, DDP, FSDP1, COMPILE, ACCELERATE, LIGHTNING, TRAINER]


def sections() -> dict[str, str]:
    """Heading -> text; the text above the first heading has the key ''."""
    above, *rest = PAGE.read_text().split("\n## ")
    return {"": above} | {text.split("\n", 1)[0]: text for text in rest}


def files_of(recipe: Recipe) -> dict[str, str]:
    """Name -> code: the modules that the page names, and the program, ``train.py``."""
    found = sections()
    blocks = BLOCK.findall(found[""]) + BLOCK.findall(found[recipe.heading])
    return {name or "train.py": code for name, code in blocks}


def write(
    recipe: Recipe, folder: Path, *, kill_at: int | None = None, check: str = "", seed: int = 0
) -> None:
    """Write the recipe. ``seed``: of the generators of Python and NumPy, which the recipes do not use."""
    files = files_of(recipe)
    assert sum(len(ADVANCE.findall(code)) for code in files.values()) == 1
    folder.mkdir(exist_ok=True)
    for name, code in files.items():
        if kill_at is not None:
            code = ADVANCE.sub(KILL.format(step=kill_at), code)
        if name == "train.py":
            code = f"import random, numpy; random.seed({seed}); numpy.random.seed({seed})\n" + code + check
        (folder / name).write_text(code)


def run(recipe: Recipe, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(recipe.ranks)]
    cache = str(folder.parent / "inductor")
    return subprocess.run(
        [sys.executable, *(launcher if recipe.ranks > 1 else []), "train.py"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": cache, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def everything(recipe: Recipe, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors and all other leaves of the last step."""
    reader = SafetensorsReader(folder / recipe.run_dir / "checkpoints" / paths.step_name(LAST))
    heads = {name: reader.index.head(name) for name in reader.index}
    tensors = {name: torch.empty(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in heads.items()}
    load_tensors(tensors, reader)
    return tensors, reader.raw_objects


def assert_equal(recipe: Recipe, one: Path, other: Path, *, epochs_begun: bool = True) -> None:
    """Compare the last steps; ``epochs_begun``: also how many epochs Lightning has begun."""
    tensors, objects = everything(recipe, one)
    again, other_objects = everything(recipe, other)
    assert any(name.endswith("exp_avg_sq") for name in tensors)
    assert tensors.keys() == again.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, again[name]), name
    assert "extra.scheduler" in objects
    assert {"done": LAST} in all_dicts(objects)  # the batches have their position, not one that is ahead
    if not epochs_begun:
        for state in (objects, other_objects):
            for counts in state["extra.loops"]["epoch_progress"].values():
                del counts["ready"], counts["started"]
    assert objects == other_objects


def all_dicts(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value, *(found for item in value.values() for found in all_dicts(item))]
    return [found for item in value for found in all_dicts(item)] if isinstance(value, list) else []


def aborted_at_exit(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether gloo's threads aborted a process that had finished: pytorch issue 190489, rarely."""
    return "terminate called without an active exception" in done.stderr


def kill_and_resume(
    recipe: Recipe, folder: Path, kill_at: int = 27, *, epochs_begun: bool = True, **environment: str
) -> None:
    pytest.importorskip(recipe.library)
    unkilled = LAST + 1 if recipe.depends_on_save else None  # with all saves on time
    write(recipe, folder / "whole", kill_at=unkilled, check=recipe.check)
    whole = run(recipe, folder / "whole", **environment)
    assert whole.returncode == 0, whole.stderr
    assert "fresh start at step 0" in whole.stderr

    write(recipe, folder / "parts", kill_at=kill_at)
    killed = run(recipe, folder / "parts", **environment)
    assert killed.returncode == (-9 if recipe.ranks == 1 else 1), killed.stderr

    write(recipe, folder / "parts", kill_at=unkilled, check=recipe.check, seed=1)
    resumed = run(recipe, folder / "parts", **environment)
    assert resumed.returncode == 0 or aborted_at_exit(resumed), resumed.stderr
    saved = kill_at // 8 * 8
    assert re.search(rf"resumed from \S*{paths.step_name(saved)} at step {saved} ", resumed.stderr)
    assert f"finished at step {LAST}" in resumed.stderr
    if recipe.check:
        assert "the plain model has the weights" in resumed.stdout
    assert_equal(recipe, folder / "whole", folder / "parts", epochs_begun=epochs_begun)


@pytest.mark.parametrize(
    "recipe", [PLAIN, DDP, FSDP1, ACCELERATE, TRAINER], ids=lambda recipe: recipe.heading
)
def test_recipe_killed_resumes_bitwise(recipe: Recipe, tmp_path: Path) -> None:
    kill_and_resume(recipe, tmp_path)


def test_lightning_recipe_killed_resumes_bitwise(tmp_path: Path) -> None:
    kill_and_resume(LIGHTNING, tmp_path)


def test_lightning_recipe_at_epoch_end_resumes_bitwise(tmp_path: Path) -> None:
    """It resumes at step 32; an epoch has 16. Lightning then counts one epoch too few as begun, also from its
    own checkpoints; ``trainer.current_epoch`` is the number that were processed."""
    kill_and_resume(LIGHTNING, tmp_path, 35, epochs_begun=False)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_recipe_killed_resumes_bitwise(backend: str, tmp_path: Path) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    kill_and_resume(COMPILE, tmp_path, COMPILE_BACKEND=backend)


@pytest.mark.parametrize("recipe", [LIGHTNING, TRAINER], ids=lambda recipe: recipe.heading)
def test_recipe_of_a_finished_run_takes_no_step(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip(recipe.library)
    write(recipe, tmp_path / "run")
    first = run(recipe, tmp_path / "run")
    assert first.returncode == 0, first.stderr
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    write(recipe, tmp_path / "run", kill_at=LAST + 1)
    again = run(recipe, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    step_dir = tmp_path / "run" / recipe.run_dir / "checkpoints" / paths.step_name(LAST)
    assert f"resumed from {step_dir} at step {LAST}" in again.stderr
    assert f"attempt 2: finished at step {LAST}" in again.stderr
    assert_equal(recipe, tmp_path / "before", tmp_path / "run")


def test_fsdp1_recipe_trains_as_without_checkpoints(tmp_path: Path) -> None:
    """The state that PyTorch makes for a checkpoint counts no step that was not taken."""
    dump = "torch.save([p.detach().clone() for p in model.parameters()], f'weights{rank}.pt')\n"
    write(FSDP1, tmp_path / "saved", check=dump)
    write(FSDP1, tmp_path / "alone", check=dump)
    program = tmp_path / "alone" / "train.py"
    code, count = re.subn(r'"app": FSDP1State\(model, optimizer\), ', "", program.read_text())
    assert count == 1
    program.write_text(code)
    for folder in ("saved", "alone"):
        ended = run(FSDP1, tmp_path / folder)
        assert ended.returncode == 0, ended.stderr
    for rank in range(FSDP1.ranks):
        name = f"weights{rank}.pt"
        saved, alone = torch.load(tmp_path / "saved" / name), torch.load(tmp_path / "alone" / name)
        assert all(torch.equal(one, other) for one, other in zip(saved, alone, strict=True))
        assert sum(len(one) for one in saved) > 0


@pytest.mark.smoke
def test_recipes_page_has_short_blocks_that_are_tested() -> None:
    found = sections()
    shared = found.pop("")
    assert [len(code.splitlines()) <= MAX_SHARED_LINES for _, code in BLOCK.findall(shared)] == [True]
    tested = {recipe.heading for recipe in RECIPES}
    assert {heading for heading, text in found.items() if "```python" in text} == tested
    too_long = {
        heading: [len(code.splitlines()) for _, code in BLOCK.findall(text)]
        for heading, text in found.items()
        if any(len(code.splitlines()) > MAX_LINES for _, code in BLOCK.findall(text))
    }
    assert too_long == {}
