"""What commands and starts do not do: counted, not timed."""

from __future__ import annotations

import builtins
import io
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ckpt_cli import Ckpt
from support.patch_target import patch_target
from support.runs import Launcher, make_run

from kempnerforge.checkpoint.format import paths
from kempnerforge.cli.app import Groups
from kempnerforge.cli.ckpt import Commands
from kempnerforge.errors import EXIT_BAD_CONFIG

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from bench.many_steps import make_run as make_many_steps

pytest_plugins = ["support.run_fixtures", "support.ckpt_fixtures"]

DRAW = patch_target("kempnerforge.model.init:normal_")
BUILD_MODEL = patch_target("kempnerforge.train.setup:build_model")


# Imports


def modules_after(code: str) -> set[str]:
    """Names of the modules that a process has imported after ``code``, which may end it."""
    watched = f"import sys, atexit\natexit.register(lambda: print('\\n' + ' '.join(sys.modules)))\n{code}"
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def command(*arguments: object) -> str:
    return (
        f"sys.argv = {['kempnerforge', *map(str, arguments)]}\nfrom kempnerforge.cli.app import main\nmain()"
    )


@pytest.mark.smoke
def test_package_import_loads_no_torch() -> None:
    found = modules_after("import kempnerforge\nfrom kempnerforge import CheckpointConfig, load_job")
    assert not found & {"torch", "numpy", "wandb"}
    assert not {name for name in found if name.startswith("kempnerforge.checkpoint")}


@pytest.mark.smoke
def test_cli_help_imports_no_command() -> None:
    for arguments in (["--help"], ["ckpt", "--help"]):
        found = modules_after(command(*arguments))
        assert not found & {"torch", "numpy", "wandb", "kempnerforge.config", "kempnerforge.checkpoint"}
        assert {name for name in found if name.startswith("kempnerforge.cli.")} <= {
            "kempnerforge.cli.app",
            "kempnerforge.cli.completion",
            "kempnerforge.cli.lazy",
            "kempnerforge.cli.ckpt",
        }


def test_ckpt_ls_imports_nothing_of_other_commands(tmp_path: Path) -> None:
    make_many_steps(tmp_path / "run", steps=2, shards=1)
    found = modules_after(command("ckpt", "ls", tmp_path / "run"))
    unneeded = {"torch", "numpy", "wandb", "rich.console", "safetensors", "tokenizers"}
    assert not found & unneeded
    assert not found & {
        "kempnerforge.checkpoint.tools.verify",
        "kempnerforge.config.job",
        "kempnerforge.cli.weights",
    }


def test_train_imports_no_pipelines_and_no_wandb() -> None:
    """Neither is imported, and garbage collection is on again afterwards."""
    check = "import gc\nassert gc.isenabled() and gc.get_freeze_count() > 100_000"
    found = modules_after(f"from kempnerforge.cli.train import import_training\nimport_training()\n{check}")
    assert "torch.distributed.fsdp" in found
    assert not found & {"torch.distributed.pipelining", "torch._dynamo", "wandb", "typer", "transformers"}
    assert "kempnerforge.config.reference" not in found


@pytest.mark.smoke
@pytest.mark.parametrize("group", [Groups, Commands])
def test_cli_summaries_match_first_paragraph_of_help(group: type[Groups] | type[Commands]) -> None:
    for name, member in group.members.items():
        loaded = member.load(name)
        assert loaded.name == name
        assert " ".join(loaded.help.split("\n\n")[0].split()) == member.summary


# What ``ckpt ls`` asks the file system


def count_calls(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Counter[str]:
    """How often ``work`` asks the file system for something, by kind."""
    counts: Counter[str] = Counter()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            counts[name] += 1
            return original(*args, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in ("open", "stat", "lstat", "listdir", "scandir", "read", "preadv"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        patch.setattr(builtins, "open", counted("open", open))
        patch.setattr(io, "open", counted("open", open))
        work()
    return counts


@pytest.mark.smoke
def test_ckpt_ls_file_system_calls_per_step_are_bounded(
    ckpt: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, calls = 3, {}
    for steps in (5, 15, 25):
        make_many_steps(tmp_path / str(steps), steps=steps, shards=shards)
        calls[steps] = count_calls(monkeypatch, lambda n=steps: ckpt("ls", tmp_path / str(n)))
    files = shards + 3
    at_most = {
        "open": 2,  # the manifest and the counters
        "preadv": 1,
        "read": 1,
        "lstat": files + 1,  # every file's size, and once in the listing whether there is a manifest
        "stat": 1,  # which manifest it was
    }
    more, still_more = calls[15] - calls[5], calls[25] - calls[15]
    assert more["open"] >= 10, "every step was looked at"
    assert more.keys() <= at_most.keys(), "no listing of a folder for each step"
    for name, count in more.items():
        assert count <= 10 * at_most[name], name
        assert still_more[name] <= count, "a step costs the same however many there are"
    assert still_more.keys() <= more.keys()


# What a resume does not do


@pytest.mark.smoke
def test_resume_draws_no_weights(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **{"train.max_steps": 4, "eval.interval": 0})
    dies_when_drawing = [("kill_at_call", {"target": DRAW, "rank": None})]
    assert launcher.run(run, ranks=2, faults=dies_when_drawing).statuses == [-9, -9]
    launcher.finish(run, ranks=2)
    more = launcher.run(run, "--train.max_steps=6", ranks=2, faults=dies_when_drawing)
    assert more.statuses == [0, 0], more.output
    assert run.committed()[0] == 6


def test_resume_steps_vanish_during_start_exits_2(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    """Weights that were not drawn are never trained."""
    run = make_run(tmp_path, corpus, **{"train.max_steps": 4, "eval.interval": 0})
    launcher.finish(run, ranks=2)
    gone = ("delete_at_call", {"target": BUILD_MODEL, "folder": str(run.checkpoints)})
    ended = launcher.run(run, "--train.max_steps=6", ranks=2, faults=[gone])
    assert ended.statuses == [EXIT_BAD_CONFIG] * 2, ended.output
    assert "has no step of this run, but by the records in" in ended.output
    assert paths.committed_steps(run.checkpoints) == []


def test_start_reads_ledger_once(
    launcher: Launcher, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every reader: crash-loop guard, deadline, wandb, lost steps and automatic interval."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"checkpoint.interval": "auto", "metrics.enable_wandb": True, "eval.interval": 0}
    run = make_run(tmp_path, corpus, **settings, **{"train.max_steps": 4})
    launcher.finish(run)

    def reads(steps: int) -> int:
        log = tmp_path / f"reads.{run.starts}"
        watch = ("record_reads", {"path": str(log), "name": "ledger.jsonl"})
        ended = launcher.run(run, f"--train.max_steps={steps}", faults=[watch])
        assert ended.statuses == [0], ended.output
        return len(log.read_text().splitlines())

    assert reads(6) == 1
    assert run.receipts()[-1]["source"] == "resume"
    # As if the first attempt had been killed before its first commit: the checks for lost steps read too.
    shutil.rmtree(run.checkpoints)
    for name in ("receipts.jsonl", "ledger.jsonl"):
        first = (run.folder / name).read_text().splitlines()[0]
        (run.folder / name).write_text(first + "\n")
    assert reads(8) == 1
    assert run.receipts()[-1]["source"] == "fresh start"


# Memory

STEPS_FAULTS = """
import ctypes, resource, sys, torch
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE: every page is a fault of its own
ctypes.CDLL(None).mallopt(-3, 1 << 20)  # blocks of 1 MB go back to the kernel: glibc may do so
if sys.argv[1] == "keep":
    from kempnerforge.train.environment import keep_freed_memory
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    before = faults()
    tensors = [torch.ones(6 << 20) for _ in range(4)]
    del tensors
print(faults() - before)
"""


def test_keep_freed_memory_reuses_pages_across_steps() -> None:
    """What a step frees is there for the next one."""

    def page_faults(what: str, **environment: str) -> int:
        command = [sys.executable, "-c", STEPS_FAULTS, what]
        environ = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
        return int(subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout)

    kept = page_faults("keep")
    assert page_faults("leave") > 10 * kept
    # Whoever has set malloc up is not overruled.
    assert page_faults("keep", MALLOC_MMAP_THRESHOLD_=str(1 << 20)) > 10 * kept
