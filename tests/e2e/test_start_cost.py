"""What commands and starts do not do: counted, not timed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ckpt_cli import Ckpt
from support.runs import Launcher, make_run

from kempnerforge.checkpoint import layout
from kempnerforge.cli.app import Groups
from kempnerforge.cli.ckpt import Commands
from kempnerforge.errors import EXIT_BAD_CONFIG

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench.many_steps import make_run as make_many_steps

pytest_plugins = ["support.run_fixtures", "support.ckpt_fixtures"]


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


def test_help_imports_no_command() -> None:
    for arguments in (["--help"], ["ckpt", "--help"]):
        found = modules_after(command(*arguments))
        assert not found & {"torch", "numpy", "wandb", "kempnerforge.config", "kempnerforge.checkpoint"}
        assert {name for name in found if name.startswith("kempnerforge.cli.")} <= {
            "kempnerforge.cli.app",
            "kempnerforge.cli.lazy",
            "kempnerforge.cli.ckpt",
        }


def test_ckpt_ls_imports_nothing_of_other_commands(tmp_path: Path) -> None:
    make_many_steps(tmp_path / "run", steps=2, shards=1)
    found = modules_after(command("ckpt", "ls", tmp_path / "run"))
    unneeded = {"torch", "numpy", "wandb", "rich.console", "safetensors", "tokenizers"}
    assert not found & unneeded
    assert not found & {
        "kempnerforge.checkpoint.verify",
        "kempnerforge.config.job",
        "kempnerforge.cli.weights",
    }


def test_training_imports_no_pipelines_and_no_wandb_and_collects_again() -> None:
    check = "import gc\nassert gc.isenabled() and gc.get_freeze_count() > 100_000"
    found = modules_after(f"from kempnerforge.cli.train import import_training\nimport_training()\n{check}")
    assert "torch.distributed.fsdp" in found
    assert not found & {"torch.distributed.pipelining", "torch._dynamo", "wandb", "typer", "transformers"}
    assert "kempnerforge.config.reference" not in found


@pytest.mark.parametrize("group", [Groups, Commands])
def test_summaries_are_the_first_paragraphs_of_the_help(group: type[Groups] | type[Commands]) -> None:
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
        patch.setattr("builtins.open", counted("open", open))
        patch.setattr("io.open", counted("open", open))
        work()
    return counts


def test_ckpt_ls_asks_little_for_every_step(
    ckpt: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, calls = 3, {}
    for steps in (5, 25):
        make_many_steps(tmp_path / str(steps), steps=steps, shards=shards)
        calls[steps] = count_calls(monkeypatch, lambda n=steps: ckpt("ls", tmp_path / str(n)))
    each = {name: (count - calls[5][name]) / 20 for name, count in calls[25].items()}
    files = shards + 3
    assert {name: count for name, count in each.items() if count} == {
        "open": 2,  # the manifest and the counters
        "preadv": 1,
        "read": 1,
        "lstat": files + 1,  # every file's size, and once in the listing whether there is a manifest
        "stat": 1,  # which manifest it was
    }


# What a resume does not do


def test_a_resumed_run_draws_no_weights(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **{"train.max_steps": 4, "eval.interval": 0})
    dies_when_drawing = [("kill_at_call", {"target": "kempnerforge.model.init:normal_", "rank": None})]
    assert launcher.run(run, ranks=2, faults=dies_when_drawing).statuses == [-9, -9]
    launcher.finish(run, ranks=2)
    more = launcher.run(run, "--train.max_steps=6", ranks=2, faults=dies_when_drawing)
    assert more.statuses == [0, 0], more.output
    assert run.committed()[0] == 6


def test_a_run_whose_steps_vanish_during_the_start_does_not_train_undrawn_weights(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **{"train.max_steps": 4, "eval.interval": 0})
    launcher.finish(run, ranks=2)
    gone = (
        "delete_at_call",
        {"target": "kempnerforge.train.build:build_model", "folder": str(run.checkpoints)},
    )
    ended = launcher.run(run, "--train.max_steps=6", ranks=2, faults=[gone])
    assert ended.statuses == [EXIT_BAD_CONFIG] * 2, ended.output
    assert "went away during the start" in ended.output
    assert layout.committed_steps(run.checkpoints) == []


# Memory

STEPS_FAULTS = """
import ctypes, resource, sys, torch
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


def test_what_a_step_frees_is_there_for_the_next_one() -> None:
    def page_faults(what: str, **environment: str) -> int:
        command = [sys.executable, "-c", STEPS_FAULTS, what]
        told = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
        return int(subprocess.run(command, env=told, capture_output=True, text=True, check=True).stdout)

    pages = 4 * (24 << 20) // 4096
    assert page_faults("keep") < pages / 100
    assert page_faults("leave") > pages / 2
    # Whoever has set malloc up is not overruled.
    assert page_faults("keep", MALLOC_MMAP_THRESHOLD_=str(1 << 20)) > pages / 2
