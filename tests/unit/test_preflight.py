"""Files that a config names, looked at before anything is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.ckpt_cli import Done
from support.step_maker import write_step
from support.token_folders import numbered, write_folder
from support.tokenizers import make_tokenizer

from kempnerforge.checkpoint.load.load_path import candidates
from kempnerforge.checkpoint.run import metadata
from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.cli import app
from kempnerforge.config.schema import load_job
from kempnerforge.data.reading.files import find_files
from kempnerforge.errors import ConfigError, StepNotFoundError
from kempnerforge.train.preflight import check_files, file_faults

WHOLE = {"optimizer": {"kind": "AdamW"}, "data": {}, "step": 4}
MODEL = "[model]\ndim = 64\nn_layers = 2\nn_heads = 2\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with good text, good data, a step, and what is wrong in one way each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n" * 1000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link").symlink_to("gone")
    np.save(tmp_path / "tokens.npy", np.arange(20000, dtype=np.uint16) % 250)
    np.save(tmp_path / "short.npy", np.arange(20, dtype=np.uint16))
    lengths = [200] * 20
    write_folder(tmp_path / "prepared", {"train": numbered(lengths), "val": numbered(lengths)})
    make_tokenizer(tmp_path / "base" / "tokenizer.json")
    (tmp_path / "hf").mkdir()
    (tmp_path / "pickles").mkdir()
    for folder in ("hf", "pickles"):
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "hf" / "model.safetensors").write_text("")
    for name, config in (("old", MODEL), ("wide", MODEL.replace("64", "128"))):
        write_step(tmp_path / name / "checkpoints", 4, config=config, objects=WHOLE)
    write_step(tmp_path / "weights", 4, config=MODEL, objects={})
    (tmp_path / "old" / "checkpoints" / "step_00000008").mkdir()
    (tmp_path / "old" / "checkpoints" / "step_00000008" / "manifest.json").write_text("{")
    return tmp_path


GOOD = [
    "--data.text=a.txt",
    "--data.cache_dir=cache",
    "--model.dim=64",
    "--model.n_layers=2",
    "--model.n_heads=2",
]
DATA = ["--data.text=none", "--data.dataset_path"]
PREPARED = [*DATA[:1], DATA[1] + "=prepared", "--model.vocab_size=60000", "--eval.interval=5"]
TABLE: dict[str, tuple[list[str], str, str]] = {
    "no text": (["--data.text=b.txt"], "data.text", "matches no file"),
    "no text in a glob": (["--data.text=*.md"], "data.text", "matches no file"),
    "one of two": (['--data.text=["a.txt", "b.txt"]'], "data.text", "b.txt"),
    "empty text": (["--data.text=empty.txt"], "data.text", "the file is empty"),
    "a broken symbolic link": (["--data.text=link"], "data.text", "is a broken symbolic link"),
    "only broken links": (["--data.text=links"], "data.text", "it has only broken symbolic links"),
    "no tokenizer": (["--data.tokenizer=tok.json"], "data.tokenizer", "no such file"),
    "no tokenizer in it": (["--data.tokenizer=a.txt"], "data.tokenizer", "not a Hugging Face tokenizer.json"),
    "no chat template": (
        ["--data.format=chat", "--data.tokenizer=base"],
        "data.tokenizer",
        "no chat template",
    ),
    "no such template": (
        ["--data.format=chat", "--data.tokenizer=base", "--data.chat_template=none.jinja"],
        "data.tokenizer",
        "none.jinja: no such file",
    ),
    "no data": ([*DATA[:1], DATA[1] + "=data/tokens"], "data.dataset_path", "no such file or folder"),
    "no shards": ([*DATA[:1], DATA[1] + "=nothing"], "data.dataset_path", "neither index.json nor .npy"),
    "too few tokens": ([*DATA[:1], DATA[1] + "=short.npy"], "data.dataset_path", "too few tokens"),
    "documents of .npy": (
        [*DATA[:1], DATA[1] + "=tokens.npy", "--data.packing=best_fit"],
        "data.dataset_path",
        ".npy shards do not record where documents end",
    ),
    "no place for packings": (
        [*PREPARED, "--data.packing=best_fit", "--data.cache_dir=a.txt/c"],
        "data.cache_dir",
        "a.txt is a file",
    ),
    "variable of run.dir": (["--run.dir=$UNSET/run"], "run.dir", '"$UNSET/run": $UNSET is not set; set'),
    "variable of checkpoint.dir": (["--checkpoint.dir=${UNSET}/{run_id}"], "checkpoint.dir", "$UNSET is not"),
    "variable of cache_dir": (["--data.cache_dir=$UNSET"], "data.cache_dir", "$UNSET is not set"),
    "variable of tokenizer": (["--data.tokenizer=~/$UNSET/t"], "data.tokenizer", "$UNSET is not set"),
    "variable of load_path": (["--checkpoint.load_path=a$UNSET"], "checkpoint.load_path", "$UNSET is not"),
    "variable of data": ([*DATA[:1], DATA[1] + "=$UNSET/tokens"], "data.dataset_path", "$UNSET is not set"),
    "run.dir below a file": (["--run.dir=a.txt/run"], "run.dir", "a.txt is a file"),
    "run.dir is a file": (["--run.dir=a.txt"], "run.dir", "a.txt is a file"),
    "a placeholder below a file": (["--run.dir=a.txt/{job_id}/x"], "run.dir", "a.txt is a file"),
    "run.dir is a link": (["--run.dir=link/run"], "run.dir", "is a broken symbolic link"),
    "no place for checkpoints": (["--checkpoint.dir=a.txt"], "checkpoint.dir", "a.txt is a file"),
    "no place that can be written": (["--checkpoint.dir=/proc/1/x"], "checkpoint.dir", "cannot be written"),
    "no place for the cache": (["--data.cache_dir=a.txt/c"], "data.cache_dir", "a.txt is a file"),
    "no load_path": (["--checkpoint.load_path=new"], "checkpoint.load_path", "new does not exist"),
    "a file": (["--checkpoint.load_path=a.txt"], "checkpoint.load_path", "a.txt is a file"),
    "no step": (["--checkpoint.load_path=nothing"], "checkpoint.load_path", "holds no committed checkpoint"),
    "Hugging Face": (
        ["--checkpoint.load_path=hf"],
        "checkpoint.load_path",
        "kempnerforge import hf hf --out DIR",
    ),
    "Hugging Face in one file": (
        ["--checkpoint.load_path=hf/model.safetensors"],
        "checkpoint.load_path",
        "is a file; to start from a Hugging Face model, download it, import it, then use DIR: "
        "kempnerforge import hf hf --out DIR",
    ),
    "Hugging Face by name": (
        ["--checkpoint.load_path=meta-llama/Llama-3.2-1B"],
        "checkpoint.load_path",
        "kempnerforge import hf FOLDER --out DIR",
    ),
    "Hugging Face of pickles": (
        ["--checkpoint.load_path=pickles"],
        "checkpoint.load_path",
        "kempnerforge import hf pickles --out DIR",
    ),
    "a damaged step": (["--checkpoint.load_path=old"], "checkpoint.load_path", "step_00000008 is damaged"),
    "another model": (["--checkpoint.load_path=wide"], "checkpoint.load_path", "model.dim was 128, is 64"),
    "weights alone": (["--checkpoint.load_path=weights"], "checkpoint.load_path", "exclude_from_loading"),
}


@pytest.mark.parametrize("case", TABLE)
def test_preflight_fault_names_key_and_value(here: Path, case: str) -> None:
    overrides, key, words = TABLE[case]
    before = sorted(here.rglob("*"))
    (fault,) = file_faults(load_job(None, [*GOOD, *overrides], inside_job=False).job)
    assert (fault.key, words in str(fault)) == (key, True), str(fault)
    assert sorted(here.rglob("*")) == before, "nothing was made"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["--run.dir=a/b/c", "--checkpoint.dir=d/e"],
        ["--run.dir=runs/{job_id}/x"],
        ["--data.text=none", "--data.dataset_path=tokens.npy"],
        [*PREPARED, "--data.packing=best_fit", "--data.document_mask=true"],
        ["--checkpoint.load_path=old/checkpoints/step_00000004"],
        [
            "--checkpoint.load_path=weights",
            '--checkpoint.exclude_from_loading=["optimizer","scheduler","data"]',
        ],
        ["--checkpoint.load_path=wide", '--checkpoint.exclude_from_loading=["model"]'],
    ],
)
def test_preflight_what_runs_make_need_not_exist(here: Path, overrides: list[str]) -> None:
    check_files(load_job(None, [*GOOD, *overrides], inside_job=False).job)


def test_preflight_broken_link_in_folder_is_ignored(here: Path) -> None:
    """The link is passed over when the text is read."""
    (here / "links" / "text.txt").write_text("some text\n")
    check_files(load_job(None, [*GOOD, "--data.text=links"], inside_job=False).job)
    assert [path.path.name for path in find_files("links").passed_over] == ["link"]


def test_preflight_variables_in_paths_are_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", str(here))
    overrides = [
        "--run.dir=${SCRATCH}/run",
        "--checkpoint.dir=$SCRATCH/{run_name}",
        "--data.cache_dir=$SCRATCH/cache",
        "--data.text=none",
        "--data.dataset_path=$SCRATCH/tokens.npy",
    ]
    job = load_job(None, [*GOOD, *overrides], inside_job=False).job
    check_files(job)
    assert job.run.folder == here / "run"
    assert job.data.cache_folder == here / "cache"


def test_preflight_all_faults_at_once(here: Path) -> None:
    overrides = [
        "--data.text=b.txt",
        "--data.tokenizer=t.json",
        "--run.dir=a.txt",
        "--checkpoint.load_path=x",
    ]
    with pytest.raises(ConfigError) as caught:
        check_files(load_job(None, [*GOOD, *overrides]).job)
    keys = [fault.key for fault in caught.value.faults]
    assert keys == ["run.dir", "data.text", "data.tokenizer", "checkpoint.load_path"]


def test_preflight_sources_of_a_mixture_are_named(here: Path) -> None:
    """Each source has faults of its own, and their tokenizers are compared."""
    index = json.loads((here / "prepared" / "index.json").read_text())
    write_folder(here / "other", {"train": numbered([200] * 20), "val": numbered([200] * 20)})
    sources = [
        ("text", "a.txt"),
        ("text", "gone.txt"),
        ("dataset_path", "short.npy"),
        ("dataset_path", "$NONE/x"),
    ]
    tables = [f'{{name = "s{i}", {key} = "{path}", weight = 1}}' for i, (key, path) in enumerate(sources)]
    good = [option for option in GOOD if not option.startswith("--data.text")]
    job = load_job(None, [*good, f"--data.sources=[{', '.join(tables[:3])}]"]).job
    assert [fault.key for fault in file_faults(job)] == [
        "data.sources[1].text",
        "data.sources[2].dataset_path",
    ]
    job = load_job(None, [*good, f"--data.sources=[{', '.join(tables)}]"]).job
    assert [str(fault).split(";")[0] for fault in file_faults(job)] == [
        'data.sources[3].dataset_path: "$NONE/x": $NONE is not set'
    ]
    (here / "other" / "index.json").write_text(json.dumps(index | {"tokenizer_digest": "b" * 32}))
    tables = [f'{{name = "{name}", dataset_path = "{name}", weight = 1}}' for name in ("prepared", "other")]
    job = load_job(None, [*good, f"--data.sources=[{', '.join(tables)}]"]).job
    faults = [fault for fault in file_faults(job) if fault.key == "data.sources"]
    assert [fault.problem.partition(",")[0] for fault in faults] == [
        '"prepared" and "other" have different tokenizers'
    ]


def test_preflight_resume_needs_no_load_path(here: Path) -> None:
    """A requeue repeats the command; the source may have been deleted by then."""
    metadata.write(here / "old", RunRecord("abc", "abc", 1.0, attempt=1))
    check_files(load_job(None, [*GOOD, "--run.dir=old", "--checkpoint.load_path=deleted"]).job)


def test_load_path_run_with_moved_checkpoints_found(here: Path) -> None:
    (here / "run").mkdir()
    moved = str(here / "wide" / "checkpoints")
    metadata.write(here / "run", RunRecord("abc", "abc", 1.0, checkpoint_dir=moved))
    assert candidates(here / "run") == [here / "wide" / "checkpoints" / "step_00000004"]
    (here / "run" / "run.json").write_text("{")
    with pytest.raises(StepNotFoundError, match="holds no committed checkpoint"):
        candidates(here / "run")


@pytest.fixture
def kempnerforge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Call the command in this process."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["kempnerforge", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert isinstance(ended.value.code, int)
        captured = capsys.readouterr()
        return Done(ended.value.code, captured.out, captured.err)

    return call


def test_config_check_looks_at_files_unless_told_not_to(
    here: Path, kempnerforge: Callable[..., Done]
) -> None:
    config = here / "x.toml"
    config.write_text(f"[data]\ntext = {json.dumps(str(here / 'b.txt'))}\n")
    done = kempnerforge("config", "check", "x.toml", "--run.dir=a.txt")
    assert (done.status, done.out) == (2, "")
    assert "2 faults" in done.err
    assert "run.dir:" in done.err
    assert "[command line]" in done.err
    assert "data.text:" in done.err
    assert "[x.toml]" in done.err
    assert kempnerforge("config", "check", "x.toml", "--no-files", "--run.dir=a.txt").status == 0
    config.write_text('[data]\ntext = "a.txt"\n')
    assert kempnerforge("config", "check", "x.toml").status == 0
