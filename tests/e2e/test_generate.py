"""``kempnerforge generate``: the same text on any number of processes, and as by transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.ckpt_cli import Ckpt
from support.runs import Ended, Launcher, Run, copy_run, make_run
from support.step_maker import flip_byte
from support.tokenizers import make_tokenizer

pytest_plugins = ["support.ckpt_fixtures", "support.run_fixtures"]

OWN_MODELS = Path(__file__).parents[1] / "support" / "own_models.py"
PROMPT = "gab"
GREEDY = ("--temperature", "0", "--max-tokens", "25")
SETTINGS: dict[str, Any] = {
    "train.max_steps": 24,
    "checkpoint.interval": 12,
    "eval.interval": 0,
    "optimizer.lr": 1e-2,
}


@pytest.fixture(scope="module")
def trained(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two ranks under FSDP2, of bytes."""
    run = make_run(tmp_path_factory.mktemp("trained"), corpus, **SETTINGS, **{"distributed.dp_shard": 2})
    launcher.finish(run, ranks=2)
    return run


def generate(
    launcher: Launcher, run: Run, *arguments: str, ranks: int = 1, path: Path | None = None
) -> Ended:
    command = ["generate", str(path or run.folder), "--prompt", PROMPT]
    return launcher.run(run, *arguments, ranks=ranks, command=command)


def body(ended: Ended) -> dict[str, Any]:
    """The JSON object of rank 0. The other ranks print nothing."""
    assert ended.statuses == [0] * len(ended.statuses), ended.output
    assert all(text == "" for text in ended.outputs[1:])
    return json.loads(ended.outputs[0][ended.outputs[0].index("{") :])


def kempnerforge(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kempnerforge", *map(str, arguments)]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ, **options)


@pytest.mark.smoke
def test_generate_same_text_on_one_process_fsdp_and_tp(launcher: Launcher, trained: Run) -> None:
    alone = body(generate(launcher, trained, *GREEDY, "--json"))
    assert alone["step"] == 24
    assert (alone["prompt"], alone["tokens"], alone["end_token"]) == (PROMPT, 25, None)
    assert len(alone["text"]) == 25
    sharded = body(generate(launcher, trained, *GREEDY, "--json", ranks=2))
    split = body(generate(launcher, trained, *GREEDY, "--json", "--distributed.tp=2", ranks=2))
    assert alone["text"] == sharded["text"] == split["text"]
    other = body(generate(launcher, trained, *GREEDY, "--json", path=trained.step_folder(12)))
    assert (other["step"], other["text"] != alone["text"]) == (12, True)


def test_generate_same_seed_same_text(launcher: Launcher, trained: Run) -> None:
    def sampled(*arguments: str, ranks: int = 1) -> str:
        return body(generate(launcher, trained, "--json", "--max-tokens=40", *arguments, ranks=ranks))["text"]

    first = sampled("--seed=5", "--temperature=1.5")
    assert first == sampled("--seed=5", "--temperature=1.5", ranks=2)
    assert first != sampled("--seed=6", "--temperature=1.5")


@pytest.mark.smoke
def test_generate_prints_prompt_text_and_summary(launcher: Launcher, trained: Run) -> None:
    ended = generate(launcher, trained, *GREEDY, path=trained.checkpoints / "latest")
    notice, text, summary = ended.outputs[0].splitlines()
    assert notice.startswith("the layout of the step, dp_replicate 1 x dp_shard 2 x tp 1")
    assert (text[:3], len(text)) == (PROMPT, 3 + 25)
    assert summary.startswith("25 tokens in ")
    assert summary.endswith(" s, ended by --max-tokens")


def test_generate_step_of_pipeline_and_tensor_layouts(
    launcher: Launcher, corpus: Path, tmp_path: Path, ckpt: Ckpt
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for layout in ("pp", "tp"):
        run = make_run(
            tmp_path / layout, corpus, **SETTINGS, **{f"distributed.{layout}": 2, "train.batch_size": 2}
        )
        launcher.finish(run, ranks=2)
        alone = body(generate(launcher, run, *GREEDY, "--json"))
        assert alone["text"] == body(generate(launcher, run, *GREEDY, "--json", ranks=2))["text"]
        hf = tmp_path / f"{layout}-hf"
        assert ckpt("export", run.checkpoints / "latest", "--out", hf).status == 0
        model: Any = AutoModelForCausalLM.from_pretrained(hf)
        tokenizer = AutoTokenizer.from_pretrained(hf)
        prompt = tokenizer(PROMPT, return_tensors="pt")
        said = model.generate(**prompt, max_new_tokens=25, do_sample=False)[0]
        assert tokenizer.decode(said, skip_special_tokens=True) == PROMPT + alone["text"]
        # And from the export, imported again.
        assert kempnerforge("import", "hf", hf, "--out", tmp_path / f"{layout}-ours").returncode == 0
        arguments = (*GREEDY, "--json", "--train.mixed_precision=fp32")
        again = body(generate(launcher, run, *arguments, path=tmp_path / f"{layout}-ours"))
        assert again["text"] == alone["text"]


def test_generate_and_export_after_data_prepare(
    launcher: Launcher, corpus: Path, tmp_path: Path, ckpt: Ckpt
) -> None:
    """The prepared folder has the tokenizer, and the step records where: no option is needed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tokenizer(tmp_path / "tok" / "tokenizer.json")
    data = tmp_path / "tokens"
    made = kempnerforge("data", "prepare", corpus, "--out", data, "--tokenizer", tmp_path / "tok")
    assert made.returncode == 0, made.stderr
    settings = {"data.text": None, "data.val_fraction": None, "data.dataset_path": "tokens"}
    run = make_run(tmp_path / "run", corpus, **SETTINGS, **settings, **{"model.vocab_size": 320})
    os.rename(data, run.base / "tokens")
    launcher.finish(run)
    found = body(generate(launcher, run, *GREEDY, "--json"))
    done = ckpt("export", run.checkpoints / "latest", "--out", tmp_path / "hf")
    assert (done.status, done.err) == (0, "")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token == "</s>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    start = tokenizer("</s>" + PROMPT, return_tensors="pt", add_special_tokens=False)
    said = model.generate(**start, max_new_tokens=25, do_sample=False)[0]
    assert tokenizer.decode(said[1:]).removesuffix("</s>") == PROMPT + found["text"]


def test_generate_with_a_model_of_the_users(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    """Saved from a pipeline. Its own plan for tensor parallelism is used."""
    llama = {f"model.{key}": None for key in ("dim", "n_layers", "n_heads", "max_seq_len")}
    own = {"model.name": "lab_models:Planned", "distributed.pp": 2, "train.batch_size": 2}
    run = make_run(tmp_path, corpus, **SETTINGS, **llama | own)
    shutil.copyfile(OWN_MODELS, tmp_path / "lab_models.py")
    launcher.finish(run, ranks=2)
    alone = body(generate(launcher, run, *GREEDY, "--json"))
    assert alone["tokens"] == 25
    sharded = body(generate(launcher, run, *GREEDY, "--json", ranks=2))
    split = body(generate(launcher, run, *GREEDY, "--json", "--distributed.tp=2", ranks=2))
    assert alone["text"] == sharded["text"] == split["text"]


def test_generate_reader_that_leaves_ends_it(trained: Run) -> None:
    command = [sys.executable, "-m", "kempnerforge", "generate", str(trained.folder), "--prompt", PROMPT]
    command += ["--max-tokens", "100000", "--model.max_seq_len=32"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout is not None
    assert started.stderr is not None
    assert started.stdout.read(5)[:3] == PROMPT.encode()
    started.stdout.close()
    error = started.stderr.read().decode()
    started.stderr.close()
    assert started.wait(60) == 0
    assert error.endswith(", ended by a closed pipe\n")
    assert "Traceback" not in error
    assert "Error" not in error


def test_generate_damaged_step_fails_on_all_ranks(launcher: Launcher, trained: Run, tmp_path: Path) -> None:
    run = copy_run(trained, tmp_path / "copy")
    flip_byte(run.step_folder(24) / "shard_00001_of_00002.safetensors", -3)
    ended = generate(launcher, run, ranks=2)
    assert ended.statuses == [1, 1], ended.output
    assert "is damaged" in ended.outputs[0]
    assert ended.outputs[1] == ""


def test_generate_control_characters_are_escaped(launcher: Launcher, trained: Run) -> None:
    command = ["generate", str(trained.folder), "--prompt", "a\x1b[31m\x07b", "--max-tokens=1"]
    ended = launcher.run(trained, command=command)
    assert "a\\x1b[31m\\x07b" in ended.outputs[0]
    assert "\x1b" not in ended.outputs[0]
