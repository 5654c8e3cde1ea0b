"""``kempnerforge submit`` without a scheduler: the script that it renders, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ckpt_cli import Done
from support.runs import Launcher, make_run

from kempnerforge.cli import app
from kempnerforge.slurm.sweep import make_sweep, write_sweep

pytest_plugins = ["support.run_fixtures"]

ROOT = Path(__file__).parents[2]

Command = Callable[..., Done]


@pytest.fixture
def kempnerforge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Call the command in this process."""

    def call(*arguments: str, **environ: str) -> Done:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["kempnerforge", *arguments])
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                app.main()
        assert isinstance(ended.value.code, int)
        captured = capsys.readouterr()
        return Done(ended.value.code, captured.out, captured.err)

    return call


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which must not import torch."""
    code = "import sys; from kempnerforge.cli.app import main\ntry:\n    main()\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


LLAMA = [
    *("submit", "configs/llama_7b.toml", "--nodes=4", "--gpus-per-node=8", "--time=24:00:00"),
    *("--cpus-per-task=64", "--no-files"),
]


def _link_secret(script: list[str]) -> str:
    """Return the key that a step of the script would get, after checking its form."""
    made = "\n".join(line for line in script if "KEMPNERFORGE_LINK_SECRET" in line)
    command = ["bash", "-c", f'{made}\nbash -c "echo \\$KEMPNERFORGE_LINK_SECRET"']
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"([0-9a-f]{16}\s+){4}", text), text
    return text


@pytest.mark.smoke
def test_submit_dry_run_prints_script_bash_can_read() -> None:
    name = "--run.dir=runs/it's; rm x"
    done = process(*LLAMA, "--dry-run", name, "--", "-p", "gpu", "--qos=low")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "export KEMPNERFORGE_REQUEUE=1" in lines
    assert _link_secret(lines) != _link_secret(lines)
    assert "KEMPNERFORGE_REQUEUE" not in process(*LLAMA, "--dry-run", "--", "--no-requeue").stdout
    for line in ("--nodes=4", "--gpus-per-node=8", "--signal=B:USR1@120", "--requeue", "-p gpu", "--qos=low"):
        assert f"#SBATCH {line}" in lines
    assert lines[0] == "#!/bin/bash"
    assert "@" not in "".join(line for line in lines if line.isupper())
    (train,) = [line for line in lines if line.startswith("train=(")]
    assert shlex.split(train.removeprefix("train=(").removesuffix(")"))[-1] == name
    checked = subprocess.run(["bash", "-n"], input=done.stdout, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.smoke
def test_submit_invalid_layout_is_not_queued(kempnerforge: Command) -> None:
    arguments = ["--nodes=3", "--train.sed=1"]
    done = kempnerforge(*LLAMA, *arguments, PATH="")
    assert done.status == 2
    assert "but processes started: 24" in done.err
    assert "--train.sed: is not a known key" in done.err
    assert "Traceback" not in done.err


@pytest.mark.smoke
def test_submit_missing_files_are_not_queued(kempnerforge: Command, tmp_path: Path) -> None:
    """They would be missed after hours in the queue."""
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\ntouch {tmp_path}/queued\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    missing = [f"--run.dir={tmp_path}/run", "--checkpoint.load_path=/nowhere/step", "--data.dataset_path=/no"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    for more in ([], ["--dry-run"]):
        done = kempnerforge(*LLAMA[:-1], *missing, *more, PATH=path)
        assert (done.status, done.out) == (2, "")
        assert "2 faults" in done.err
        for words in (
            "checkpoint.load_path: /nowhere/step does not exist",
            "data.dataset_path:",
            "--no-files",
        ):
            assert words in done.err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "queued").exists()
    assert kempnerforge(*LLAMA, *missing, PATH=path).status == 0
    assert (tmp_path / "queued").exists()


SCONTROL = """#!/bin/bash
case "$*" in
    "show config") echo "KillWait = 30 sec" ;;
    "-o show partition") echo "PartitionName=low Default=YES GraceTime=900 PreemptMode=REQUEUE" ;;
    *) exit 1 ;;
esac
"""


@pytest.mark.smoke
def test_submit_shutdown_timeout_fits_partition_grace(kempnerforge: Command, tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "run").mkdir()
    commit = {"event": "commit", "attempt": 1, "time": 1.0, "step": 4, "total_s": 1000.0, "blocking_s": 1.0}
    (tmp_path / "run/ledger.jsonl").write_text(json.dumps(commit) + "\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = kempnerforge(*LLAMA, "--dry-run", f"--run.dir={tmp_path}/new", PATH=path)
    assert "--train.shutdown_timeout_s=895)" in done.out
    assert done.err == ""
    done = kempnerforge(*LLAMA, "--dry-run", f"--run.dir={tmp_path}/run", PATH=path)
    assert "saves of this run took up to 1000 s" in done.err
    own = "--train.shutdown_timeout_s=1000"
    done = kempnerforge(*LLAMA, "--dry-run", f"--run.dir={tmp_path}/new", own, PATH=path)
    assert f"{own})" in done.out
    assert "is 1000 s: a hung shutdown would be killed without a report" in done.err


def test_submit_without_slurm_says_so(kempnerforge: Command, tmp_path: Path) -> None:
    done = kempnerforge(*LLAMA, f"--run.dir={tmp_path}", PATH="")
    assert done.status == 1
    assert done.err.startswith("sbatch is not installed here")
    assert kempnerforge("slurm", "after", str(tmp_path), SLURM_JOB_ID="").status == 1


@pytest.mark.smoke
def test_submit_without_cpus_warns(kempnerforge: Command) -> None:
    without = [word for word in LLAMA if not word.startswith("--cpus")]
    done = kempnerforge(*without, "--dry-run")
    assert done.err.startswith(
        "warning: no --cpus-per-task is given: many clusters then give the 8 processes"
    )
    assert kempnerforge(*without, "--dry-run", "--", "-c", "64").err == ""


@pytest.mark.smoke
def test_submit_resources_and_prologue_are_in_the_script(kempnerforge: Command) -> None:
    without = [word for word in LLAMA if not word.startswith("--gpus")]
    more = ["--gres=gpu:h100:8", "--mem=0", "--prologue=module purge", "--prologue=module load cuda/13"]
    lines = kempnerforge(*without, *more, "--dry-run").out.splitlines()
    for line in ("#SBATCH --gres=gpu:h100:8", "#SBATCH --cpus-per-task=64", "#SBATCH --mem=0"):
        assert line in lines
    assert "processes_per_node=8" in lines
    assert not any("--gpus-per-node" in line for line in lines)
    prologue = lines.index("module purge")
    assert lines[prologue + 1] == "module load cuda/13"
    # The environment of this command comes before what modules put into PATH.
    assert prologue < next(index for index, line in enumerate(lines) if line.startswith("PATH="))


TINY = """\
data.text = "python-stdlib"
[model]
dim = 32
n_layers = 1
n_heads = 2
"""


@pytest.mark.smoke
def test_submit_sweep_checks_cells_and_stores_overrides(kempnerforge: Command, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TINY)
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\ncat >{tmp_path}/job.sh\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    folder = tmp_path / "sweep"
    command = ["submit", str(tmp_path / "run.toml"), "--nodes=1", "--gpus-per-node=0", "--time=30"]
    command += [f"--run.dir={folder}", "--no-files", "--sweep"]
    bad = kempnerforge(*command, "optimizer.lr=[1e-4,-3e-4]", PATH=path)
    assert bad.status == 2
    assert bad.err.startswith("task 1 of the sweep (optimizer.lr=-0.0003): 1 fault in the configuration")
    assert not folder.exists()
    assert kempnerforge(*command, "train.seed=[1,2]", "--", "--array=0-1", PATH=path).status == 2
    done = kempnerforge(*command, "optimizer.lr=[1e-4,3e-4]", "--sweep=train.seed=[1,2,3]", PATH=path)
    assert done.status == 0, done.err
    assert done.out.startswith("job 7: 6 runs, each 1 x 1 processes")
    script = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --array=0-5\n" in script
    assert f"kempnerforge slurm cell {folder}" in script
    cell = kempnerforge("slurm", "cell", str(folder), SLURM_ARRAY_TASK_ID="4")
    assert cell.out.splitlines() == [
        *("--optimizer.lr=0.0003", "--train.seed=2"),
        *("--run.name=run-4", f"--run.dir={folder}/4"),
    ]
    assert kempnerforge("slurm", "cell", str(folder), SLURM_ARRAY_TASK_ID="6").status == 2


SCRIPTS = {
    "one_node.sh": [
        *("configs/quickstart.toml", "--nodes", "1", "--gpus-per-node", "2", "--cpus-per-task", "8"),
        *("--time", "2:00:00"),
    ],
    "many_nodes.sh": [
        *("configs/llama_7b.toml", "--nodes", "4", "--gpus-per-node", "8", "--cpus-per-task", "64"),
        *("--time", "24:00:00", "--no-files"),
    ],
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", SCRIPTS)
def test_submit_renders_the_scripts_of_the_repository(kempnerforge: Command, name: str) -> None:
    done = kempnerforge("submit", *SCRIPTS[name], "--dry-run")
    made = "".join(line for line in done.out.splitlines(True) if not line.startswith("PATH="))
    assert (ROOT / "slurm" / name).read_text() == made


def test_report_of_sweep_has_a_line_per_run(
    kempnerforge: Command, launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    options = ["train.seed=[1,2,3]"]
    made = make_sweep(options, file="f", overrides=[], folder=str(tmp_path / "s"), run_name="s")
    write_sweep(tmp_path / "s", made)
    losses = {}
    for cell in made.cells[:2]:
        run = make_run(tmp_path / f"base_{cell.task}", corpus, **{"run.dir": cell.run_dir})
        launcher.finish(run, *cell.overrides, *([] if cell.task else ["--train.max_steps=6"]))
        losses[cell.task] = run.counting()
    done = kempnerforge("report", str(tmp_path / "s"))
    assert done.status == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    for task, step in ((0, 6), (1, 12)):
        counting = losses[task]
        best = min(row["eval/loss"] for row in counting.values() if "eval/loss" in row)
        last = f"{counting[step]['train/loss']:.4f}"
        expected = [str(task), f"train.seed={task + 1}", "finished", str(step), last, f"{best:.4f}"]
        assert lines[1 + task] == expected
    assert lines[3] == ["2", "train.seed=3", "not", "started", "-", "-", "-"]
    as_json = kempnerforge("report", str(tmp_path / "s"), "--json")
    assert [row["step"] for row in json.loads(as_json.out)["runs"]] == [6, 12, None]
