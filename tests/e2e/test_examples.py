"""The examples train, resume with the same bits after a kill, and start from the same weights everywhere."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.documents import document_ids
from support.patch_target import patch_target
from support.run_files import tensor_digests
from support.runs import Launcher, Run, make_run

from kempnerforge.config.schema import load_job

pytest_plugins = ["support.run_fixtures"]

REPO = Path(__file__).parents[2]
UPDATE = patch_target("kempnerforge.train.step:LocalStep.update")
LOSS_UPDATE = patch_target("kempnerforge.train.loss_step:LossStep.update")
NO_LLAMA = dict.fromkeys(("model.dim", "model.n_layers", "model.n_heads", "model.max_seq_len"))
SHORT = {
    "train.max_steps": 6,
    "checkpoint.interval": 2,
    "checkpoint.save_first": True,
    "checkpoint.keep_last_n": 9,
    "eval.interval": 3,
}
VIT = {
    **NO_LLAMA,
    **SHORT,
    "model.name": "examples.vit:ViT",
    "model.args.size": 16,
    "model.args.patch": 4,
    "model.args.width": 16,
    "model.args.layers": 2,
    "model.args.heads": 2,
    "model.args.classes": 4,
    "data.text": None,
    "data.dataset": "examples.vit:Stripes",
    "data.args.count": 60,
    "data.args.size": 16,
    "data.args.classes": 4,
    "train.batch_size": 2,
    "train.activation_checkpointing": "full",
}
HF_SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}


def test_gpt2_with_document_ids_computes_documents_alone() -> None:
    model = runpy.run_path(str(REPO / "examples/gpt2.py"))["GPT2"](
        vocab_size=61, width=16, layers=2, heads=2, max_seq_len=24, dropout=0.0
    )
    tokens_BT, lengths = torch.randint(61, (2, 24)), [[5, 18, 1], [24]]
    packed = model(tokens_BT, document_ids=document_ids(lengths))
    rows = zip(tokens_BT, lengths, strict=True)
    alone = [torch.cat([model(document[None])[0] for document in row.split(cut)]) for row, cut in rows]
    torch.testing.assert_close(packed, torch.stack(alone), rtol=1e-5, atol=1e-5)


def example_run(base: Path, corpus: Path, settings: dict[str, Any]) -> Run:
    run = make_run(base, corpus, **settings)
    shutil.copytree(REPO / "examples", base / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return run


def check_resume(launcher: Launcher, base: Path, corpus: Path, settings: dict[str, Any], update: str) -> Run:
    """Kill a run on two processes in its fifth step: the resumed run equals one that was never stopped."""
    whole = example_run(base / "whole", corpus, settings)
    launcher.finish(whole, ranks=2)
    run = example_run(base / "killed", corpus, settings)
    ended = launcher.run(run, ranks=2, faults=[("kill_at_call", {"target": update, "call": 5, "rank": None})])
    assert set(ended.statuses) == {-9}, ended.output
    launcher.finish(run, ranks=2)
    assert run.receipts()[-1]["step"] in (2, 4)
    assert run.counting() == whole.counting()
    assert tensor_digests(run.step_folder(6)) == tensor_digests(whole.step_folder(6))
    alone = example_run(base / "alone", corpus, {**settings, "train.max_steps": 3})
    launcher.finish(alone)
    first, firsts = (tensor_digests(each.step_folder(0)) for each in (whole, alone))
    weights = {name: digest for name, digest in first.items() if name.startswith("model.")}
    assert weights.items() <= firsts.items()
    assert alone.counting()[1]["data/digest"] == whole.counting()[1]["data/digest"]
    assert alone.counting()[1]["train/loss"] == pytest.approx(whole.counting()[1]["train/loss"], rel=1e-5)
    return run


@pytest.mark.parametrize("file", sorted((REPO / "examples").glob("*.toml")), ids=lambda path: path.stem)
def test_examples_configs_are_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.syspath_prepend(REPO)
    from kempnerforge.config.plugin_uses import plugin_issues

    assert plugin_issues(load_job(file).job) == []
    assert len(file.with_suffix(".py").read_text().splitlines()) < 150


def test_example_vit_resumes_bitwise(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = check_resume(launcher, tmp_path, corpus, VIT, LOSS_UPDATE)
    assert [row["train/tokens"] for row in run.rows() if "train/tokens" in row][-1] == 6 * 4
    logged = run.counting()[6]["eval/loss"]
    command = ["eval", str(run.step_folder(6))]
    ended = launcher.run(run, command=command, ranks=2)
    assert ended.statuses == [0, 0], ended.output
    assert f"step 6: eval/loss {logged!r} over 8 items (2 batches of 4 sequences)" in ended.output


def test_example_vit_in_bf16_with_replicas(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    settings = {**VIT, "train.mixed_precision": "bf16", "distributed.dp_replicate": 2, "train.batch_size": 1}
    run = example_run(tmp_path / "run", corpus, settings)
    launcher.finish(run, ranks=2)
    exact = example_run(tmp_path / "exact", corpus, VIT)
    launcher.finish(exact)
    for step in range(1, 7):
        assert run.counting()[step]["train/loss"] == pytest.approx(
            exact.counting()[step]["train/loss"], rel=0.03
        )


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "gpt_neox"])
def test_example_hf_model_resumes_and_loads_in_transformers(
    launcher: Launcher, corpus: Path, tmp_path: Path, model_type: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**NO_LLAMA, **SHORT, "model.name": "examples.hf_causal_lm:build"}
    settings |= {f"model.args.{key}": value for key, value in HF_SIZES.items()}
    settings["model.args.model_type"] = model_type
    run = check_resume(launcher, tmp_path, corpus, settings, UPDATE)
    out = tmp_path / "out"
    ended = launcher.run(run, command=["ckpt", "export", str(run.step_folder(6)), "--out", str(out)])
    assert ended.statuses == [0], ended.output
    AutoConfig.for_model(model_type, **HF_SIZES).save_pretrained(out)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # The loss of the exported weights, on the text that they were trained on, is the one of training.
    text = b"".join(path.read_bytes() for path in sorted(corpus.glob("*.txt")))
    rows = torch.tensor(list(text[: 64 * 33])).view(64, 33)
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert loss == pytest.approx(run.counting()[6]["eval/loss"], abs=0.25)
    assert loss < run.counting()[1]["train/loss"] - 0.3
