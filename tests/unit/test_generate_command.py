"""What ``kempnerforge generate`` refuses before it imports torch, and which ids it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tokenizers import make_tokenizer
from support.weight_cases import make_model, save

from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.cli import app
from kempnerforge.cli.generate import _load_job
from kempnerforge.cli.step_tokenizer import find_tokens
from kempnerforge.config.schema import ModelConfig

BYTES = '[data]\ntext = "x"\n'


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return save(tmp_path, make_model(vocab_size=300), extra=BYTES)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must end with status 2, and return what it says."""
    monkeypatch.setattr("sys.argv", ["kempnerforge", "generate", *map(str, arguments), "--prompt", "x"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--temperature=-1", "--top-p=0"],
            "--temperature: -1.0; allowed: 0 or more\n  --top-p: 0.0;",
        ),
        (["--temperature=nan", "--seed=-1"], "--temperature: nan; allowed: 0 or more\n  --seed: -1;"),
        (["--top-p=1.01"], "--top-p: 1.01; allowed: more than 0, at most 1"),
        (["--max-tokens=0"], "--max-tokens: 0; allowed: 1 or more"),
        (["--distributed.pp=2"], "--distributed.pp: has no effect; generation uses no pipeline stages"),
        (["--modl.dim=2"], "--modl.dim: is not a known key"),
        (["--tokenizer", "gone"], "tokenizer gone: no such file"),
    ],
)
def test_generate_bad_arguments_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: Path,
    arguments: list[str],
    message: str,
) -> None:
    assert message in refused(monkeypatch, capsys, step, *arguments)


def test_generate_step_without_tokenizer_or_model_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare = save(tmp_path / "bare", make_model())
    error = "the tokenizer of step_00000007 is not recorded; give --tokenizer FILE\n"
    assert refused(monkeypatch, capsys, bare) == error
    assert "does not exist" in refused(monkeypatch, capsys, tmp_path / "gone")
    small = save(tmp_path / "small", make_model(vocab_size=100), extra=BYTES)
    assert "257 ids, but the model has 100" in refused(monkeypatch, capsys, small)
    make_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    pointer = refused(monkeypatch, capsys, bare, "--tokenizer", tmp_path)
    assert "tokenizer.json is a git-lfs pointer, not the file itself: run git lfs pull" in pointer


def test_generate_config_keeps_what_changes_the_model(tmp_path: Path) -> None:
    """And nothing else: not the data, the compiler, the batch and the stages."""
    step = save(
        tmp_path,
        make_model(vocab_size=300),
        extra=f"""{BYTES}dataset_path = "both"
[train]
seed = 5
mixed_precision = "fp32"
deterministic = true
seq_len = 9
compile_model = true
batch_size = 64
[distributed]
pp = 2
pp_schedule = "interleaved_1f1b"
timeout_s = 7.0
""",
    )
    said: list[str] = []
    job = _load_job(StepView.open(step), ["--model.max_seq_len=10"], 1, said.append)
    train = job.train
    assert (train.seed, train.mixed_precision, train.deterministic, train.seq_len) == (5, "fp32", True, 9)
    assert (job.model.max_seq_len, job.model.vocab_size, job.distributed.timeout_s) == (10, 300, 7.0)
    assert (train.compile_model, job.distributed.pp, job.geometry(1).dp) == (False, 1, 1)
    assert said == []
    step = save(tmp_path / "weights", make_model())
    assert _load_job(StepView.open(step), [], 1, said.append).train.seq_len == 64


@pytest.mark.parametrize(
    ("imported", "bos", "ends"),
    [
        ({}, 256, {256}),
        ({"eos_token_id": [5, 7], "bos_token_id": 3, "generation": {}}, 3, {5, 7, 256}),
        ({"eos_token_id": None, "bos_token_id": None, "generation": {}}, None, {256}),
    ],
)
def test_step_tokens_imported_model_precedes_separator(
    tmp_path: Path, imported: dict[str, object], bos: int | None, ends: set[int]
) -> None:
    objects = {"imported_from": {"format": "hf", "path": "x", **imported}} if imported else {}
    step = save(tmp_path, make_model(vocab_size=300), extra=BYTES, objects=objects)
    view = StepView.open(step)
    tokens = find_tokens(view, view.config(), ModelConfig(vocab_size=300), None, pytest.fail)
    assert (tokens.bos_token_id, tokens.end_tokens, tokens.separator_id) == (bos, ends, 256)
