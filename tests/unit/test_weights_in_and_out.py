"""Weights out and in: the same bits, the same logits as transformers, and nothing half done."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli
import torch
from safetensors.torch import load_file, save_file
from support.ckpt_cli import Ckpt
from support.step_maker import flip_byte, write_step
from support.tokenizers import make_tokenizer
from support.weight_cases import VARIANTS, assert_equal, config_toml, cut, make_model, save, weights_of

from kempnerforge.checkpoint.retention import read_locks
from kempnerforge.checkpoint.tools.float_cast import cast
from kempnerforge.cli import app, formatting
from kempnerforge.config.schema import ModelConfig, load_job
from kempnerforge.data.tokenizer import load_tokenizer
from kempnerforge.model.llama import Llama

pytest_plugins = ["support.ckpt_fixtures"]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, found by its index."""
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(set(where.values())):
        tensors = load_file(folder / file)
        assert set(tensors) == {name for name, place in where.items() if place == file}
        found.update(tensors)
    return found


@pytest.fixture
def import_hf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``kempnerforge import hf`` in this process: (status, out, err)."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["kempnerforge", "import", "hf", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


# Schedule-free optimizers


def schedule_free_step(
    folder: Path, *, kind: str = "ScheduleFreeAdamW", split_of_z: int = 2, train_mode: bool = True
) -> tuple[Path, Llama]:
    """Write a step with weights y and a state z, and return it with a model of the evaluation weights."""
    model = make_model(n_kv_heads=2)
    state = {f"model.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    generator = np.random.default_rng(1)
    z_names = {name: f"optimizers.free.state.{name.removeprefix('model.')}.z" for name in state}
    z = {z_names[name]: generator.random(y.shape, dtype=np.float32) for name, y in state.items()}
    boxes = {name: cut(array.shape, 2, by_columns=False) for name, array in state.items()}
    boxes |= {name: cut(array.shape, split_of_z, by_columns=False) for name, array in z.items()}
    group = {
        "betas": {"__tuple__": [0.8, 0.99]},
        "params": list(model.state_dict()),
        "train_mode": train_mode,
    }
    table = {"class": kind, "groups": [group], "schedule_free": True}
    step = write_step(
        folder,
        7,
        state={**state, **z},
        boxes=boxes,
        config=config_toml(model),
        objects={"optimizers": {"free": table, "rest": {"class": "AdamW", "groups": []}}},
    )
    if kind == "ScheduleFreeAdamW" and train_mode:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.lerp_(torch.from_numpy(z[z_names[f"model.{name}"]]), 1 - 1 / 0.8)
    return step, model


@pytest.mark.parametrize("train_mode", [True, False])
def test_export_of_schedule_free_step_has_average(ckpt: Ckpt, tmp_path: Path, train_mode: bool) -> None:
    step, average = schedule_free_step(tmp_path / "y", train_mode=train_mode)
    done = ckpt("export", step, "--out", tmp_path / "hf", "--max-shard-size", "30KB")
    assert done.status == 0, done.err
    assert "is not known" not in done.err
    assert "these are the evaluation weights of ScheduleFreeAdamW" in done.out
    assert ckpt("export", save(tmp_path / "x", average), "--out", tmp_path / "hf_of_x").status == 0
    torch.testing.assert_close(
        exported(tmp_path / "hf"), exported(tmp_path / "hf_of_x"), rtol=1e-6, atol=1e-7
    )


def test_export_says_that_average_is_unknown(ckpt: Ckpt, tmp_path: Path) -> None:
    step, model = schedule_free_step(tmp_path / "y", kind="OtherScheduleFree")
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert done.status == 0
    assert "how OtherScheduleFree computes its evaluation weights is not known" in done.err
    assert ckpt("export", save(tmp_path / "x", model), "--out", tmp_path / "hf_of_x").status == 0
    assert_equal(exported(tmp_path / "hf"), exported(tmp_path / "hf_of_x"))


def test_export_with_z_stored_otherwise_refused(ckpt: Ckpt, tmp_path: Path) -> None:
    step, _ = schedule_free_step(tmp_path / "y", split_of_z=3)
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert done.status == 2
    assert "are not stored alike in fp32" in done.err
    assert not (tmp_path / "hf").exists()


# Equal to transformers


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_transformers_same_logits_import_exact(
    ckpt: Ckpt, import_hf: Any, tmp_path: Path, variant: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(**VARIANTS[variant])
    step, out, back = save(tmp_path, model, split=3), tmp_path / "hf", tmp_path / "back"
    assert ckpt("export", step, "--out", out, "--max-shard-size", "30KB").status == 0
    other = AutoModelForCausalLM.from_pretrained(out)
    assert other.dtype == torch.float32
    tokens = torch.randint(61, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(tokens), other(tokens).logits
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    status, printed, _ = import_hf(out, "--out", back)
    assert status == 0
    assert_equal(weights_of(back), model.state_dict())
    assert ckpt("verify", back).status == 0
    assert config_toml(model).splitlines()[1] in printed


def test_import_transformers_folder_same_logits(import_hf: Any, tmp_path: Path) -> None:
    """In one file and in several; in bf16 too; with tied embeddings and without."""
    from transformers import LlamaConfig, LlamaForCausalLM

    cases: list[dict[str, Any]] = [
        {"tie_word_embeddings": True},
        {"max_shard_size": "20KB"},
        {"dtype": "bf16"},
    ]
    for number, settings in enumerate(cases):
        torch.manual_seed(number)
        config = LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=settings.get("tie_word_embeddings", False),
        )
        other: Any = LlamaForCausalLM(config)
        if "dtype" in settings:
            other = other.to(torch.bfloat16)
        folder, out = tmp_path / f"hf{number}", tmp_path / f"ours{number}"
        other.save_pretrained(folder, max_shard_size=settings.get("max_shard_size", "5GB"))
        assert ((folder / "model.safetensors.index.json").exists()) == ("max_shard_size" in settings)
        status, _, err = import_hf(folder, "--out", out)
        assert status == 0, err
        extending = tmp_path / "job.toml"
        extending.write_text(f'extends = "{out}/config.toml"\n[data]\ntext = "x"\ntokenizer = "t"\n')
        job = load_job(extending, ["--train.seq_len=8"]).job
        ours = Llama(job.model)
        ours.load_state_dict(weights_of(out))
        tokens = torch.arange(40).view(1, 40)
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), other.float()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_import_mistral_same_logits(import_hf: Any, tmp_path: Path) -> None:
    """With no window, with one as long as any sequence, and with the window of older configs."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32}
    sizes |= {"intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 16, "max_position_embeddings": 64, "head_dim": 2}
    torch.manual_seed(0)
    for number, window in enumerate((None, 64, 4096)):
        other = MistralForCausalLM(
            MistralConfig(**sizes, sliding_window=window, initializer_range=0.3)
        ).eval()
        folder, out = tmp_path / f"hf{number}", tmp_path / f"ours{number}"
        other.save_pretrained(folder)
        if window == 4096:  # as in configs that leave out what is the default
            body = json.loads((folder / "config.json").read_text())
            del body["sliding_window"], body["num_key_value_heads"]
            (folder / "config.json").write_text(json.dumps(body))
        status, _, err = import_hf(folder, "--out", out)
        assert status == 0, err
        model = ModelConfig.model_validate(tomli.loads((out / "config.toml").read_text())["model"])
        ours = Llama(model)
        ours.load_state_dict(weights_of(out))
        tokens = torch.arange(60).view(1, 60)
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), other(tokens).logits, rtol=1e-4, atol=1e-4)


# Out


@pytest.mark.parametrize("split", [1, 2, 5])
def test_export_any_layout_same_bytes(ckpt: Ckpt, tmp_path: Path, split: int) -> None:
    model = make_model(n_kv_heads=2)
    whole, parts = save(tmp_path / "whole", model), save(tmp_path / "parts", model, split=split)
    for step, out in ((whole, "a"), (parts, "b")):
        assert ckpt("export", step, "--out", tmp_path / out).status == 0
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_export_query_key_rows_permuted_within_heads(ckpt: Ckpt, tmp_path: Path) -> None:
    model = make_model(n_kv_heads=2)
    assert ckpt("export", save(tmp_path, model, split=2), "--out", tmp_path / "hf").status == 0
    found, ours = exported(tmp_path / "hf"), model.state_dict()
    for name in ("q", "k"):
        theirs = found[f"model.layers.1.self_attn.{name}_proj.weight"].view(-1, 2, 6, 48)
        mine = ours[f"layers.1.attention.w{name}.weight"].view(-1, 6, 2, 48)
        assert torch.equal(theirs, mine.transpose(1, 2))
    assert torch.equal(found["model.layers.1.self_attn.v_proj.weight"], ours["layers.1.attention.wv.weight"])


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_export_dtype_of_command_or_run(
    ckpt: Ckpt, tmp_path: Path, dtype: str, torch_dtype: torch.dtype
) -> None:
    model = make_model()
    extra = f'[checkpoint]\nexport_dtype = "{dtype}"\n'
    step = save(tmp_path, model, split=2, extra=extra)
    assert ckpt("export", step, "--out", tmp_path / "run").status == 0
    assert ckpt("export", step, "--out", tmp_path / "fp32", "--dtype", "fp32").status == 0
    assert ckpt("export", save(tmp_path / "x", model), "--out", tmp_path / "a", "--dtype", dtype).status == 0
    exact = exported(tmp_path / "fp32")
    assert_equal(exported(tmp_path / "run"), {name: tensor.to(torch_dtype) for name, tensor in exact.items()})
    assert_equal(exported(tmp_path / "run"), exported(tmp_path / "a"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["torch_dtype"] == str(torch_dtype)[6:]


def test_export_shards_within_max_size(ckpt: Ckpt, tmp_path: Path) -> None:
    model = make_model()
    done = ckpt(
        "export", save(tmp_path, model), "--out", tmp_path / "hf", "--max-shard-size", "0.03MB", "--json"
    )
    assert done.status == 0
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(path.stat().st_size < 31000 for path in shards)
    assert len(shards) < len(exported(tmp_path / "hf")) / 2
    assert sorted(done.json["files"]) == sorted(os.listdir(tmp_path / "hf"))
    assert done.json["size_bytes"] == sum(path.stat().st_size for path in (tmp_path / "hf").iterdir())
    assert (
        ckpt(
            "export", save(tmp_path / "x", model), "--out", tmp_path / "y", "--max-shard-size", "much"
        ).status
        == 2
    )


def test_export_set_aside_step_by_name(ckpt: Ckpt, tmp_path: Path) -> None:
    step = save(tmp_path, make_model())
    for name in ("rolledback.step_00000007.1", "late.step_00000007.1"):
        step = step.rename(tmp_path / name)
        assert ckpt("export", step, "--out", tmp_path / f"{name}.hf").status == 0
    assert exported(tmp_path / f"{name}.hf")


def test_export_damaged_block_leaves_nothing(ckpt: Ckpt, tmp_path: Path) -> None:
    step = save(tmp_path, make_model(), split=2)
    before = sorted(tmp_path.iterdir())
    flip_byte(step / "shard_00001_of_00002.safetensors", -3)
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert done.status == 1
    assert "shard_00001_of_00002.safetensors has a wrong digest" in done.err
    assert sorted(tmp_path.iterdir()) == before


def test_export_value_out_of_dtype_range_reported(ckpt: Ckpt, tmp_path: Path) -> None:
    model = make_model()
    assert model.norm is not None
    with torch.no_grad():
        model.norm.weight[3] = 70000.0
    done = ckpt("export", save(tmp_path, model), "--out", tmp_path / "hf", "--dtype", "fp16")
    assert done.status == 2
    assert "norm.weight holds 70000" in done.err
    assert not (tmp_path / "hf").exists()


def test_export_import_existing_folder_refused(ckpt: Ckpt, import_hf: Any, tmp_path: Path) -> None:
    step = save(tmp_path, make_model())
    (tmp_path / "hf").mkdir()
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert (done.status, done.err) == (
        2,
        f"{tmp_path}/hf exists; an export creates a new folder. Give another name\n",
    )
    assert ckpt("export", step, "--out", tmp_path / "new").status == 0
    status, _, err = import_hf(tmp_path / "new", "--out", step)
    assert status == 2
    assert "exists; an import creates a new checkpoint's folder" in err


def test_export_step_read_locked_meanwhile(
    ckpt: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = save(tmp_path, make_model()), []

    @contextlib.contextmanager
    def watching(_: str) -> Any:
        yield lambda done, total: seen.append((done, total, list(read_locks.readers(tmp_path))))

    monkeypatch.setattr(formatting, "progress", watching)
    assert ckpt("export", step, "--out", tmp_path / "hf").status == 0
    assert seen
    assert all(locked == [7] for *_, locked in seen)
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in exported(tmp_path / "hf").values())
    assert read_locks.readers(tmp_path) == {}


@pytest.mark.parametrize("config", [None, "[train]\nseed = 1\n", "[model]\nwidth = 3\n"])
def test_export_step_without_model_config_refused(ckpt: Ckpt, tmp_path: Path, config: str | None) -> None:
    done = ckpt("export", write_step(tmp_path, 7, config=config), "--out", tmp_path / "hf")
    assert done.status == 2
    assert "Traceback" not in done.err
    assert "[model]" in done.err or "model.width" in done.err


def test_export_step_of_other_model_refused(ckpt: Ckpt, tmp_path: Path) -> None:
    step = write_step(tmp_path, 7, config=config_toml(make_model()))
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert done.status == 2
    assert "model.tok_embeddings.weight is not in the checkpoint" in done.err
    assert "and 15 more" in done.err


# Tokenizers


def test_export_tokenizer_of_run_included(ckpt: Ckpt, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = tmp_path / "tok" / "tokenizer.json"
    make_tokenizer(file)
    step = save(tmp_path, make_model(vocab_size=400), extra=f'[data]\ntext = "x"\ntokenizer = "{file}"\n')
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert done.status == 0
    assert "is the tokenizer of the run: the step records none" in done.err
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == file.read_bytes()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (
        config["eos_token_id"]
        == json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    )
    assert loaded.convert_ids_to_tokens(config["eos_token_id"]) == "</s>"

    file.unlink()
    done = ckpt("export", step, "--out", tmp_path / "without")
    assert done.status == 0
    assert "tokenizer.json does not exist; give --tokenizer FILE" in done.err
    assert "the export has no tokenizer" in done.err
    assert "the export names no end token" in done.err
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    small = save(tmp_path / "small", make_model(vocab_size=3))
    done = ckpt("export", small, "--out", tmp_path / "no", "--tokenizer", tmp_path / "hf")
    assert done.status == 2
    assert "not the model's tokenizer" in done.err


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A step of a run that read text by ``tok/tokenizer.json``, relative to another folder; and that file."""
    file = tmp_path / "project" / "tok" / "tokenizer.json"
    make_tokenizer(file)
    tokenizer = {"path": str(file), "digest": load_tokenizer(str(file)).digest}
    extra = '[data]\ntext = "x"\ntokenizer = "tok/tokenizer.json"\n'
    step = save(tmp_path, make_model(vocab_size=400), extra=extra, tokenizer=tokenizer)
    make_tokenizer(tmp_path / "elsewhere" / "tok" / "tokenizer.json", eos="<eos>")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return step, file


def test_export_from_other_folder_takes_the_runs_tokenizer(
    ckpt: Ckpt, tmp_path: Path, trained: tuple[Path, Path]
) -> None:
    step, file = trained
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert (done.status, done.err) == (0, "")
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == file.read_bytes()


def test_export_rebuilt_tokenizer_is_refused(ckpt: Ckpt, tmp_path: Path, trained: tuple[Path, Path]) -> None:
    step, file = trained
    make_tokenizer(file, eos="<eos>")
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert done.status == 2
    assert f"{file} is not the tokenizer that the run was trained with" in done.err
    assert "--tokenizer FILE" in done.err
    assert not (tmp_path / "hf").exists()
    done = ckpt("export", step, "--out", tmp_path / "hf", "--tokenizer", file)
    assert done.status == 0
    assert "used as requested" in done.err
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == file.read_bytes()


# In


@pytest.fixture
def folder(ckpt: Ckpt, tmp_path: Path) -> Path:
    """A Hugging Face folder in one file, to be changed."""
    step = save(tmp_path / "source", make_model(n_kv_heads=2, tie_embeddings=True))
    assert ckpt("export", step, "--out", tmp_path / "hf").status == 0
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    return tmp_path / "hf"


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(folder / "model.safetensors") | changes
    save_file({name: one for name, one in tensors.items() if one is not None}, folder / "model.safetensors")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
EMBEDDING = "model.embed_tokens.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
BAD: dict[str, tuple[Any, int, str]] = {
    "a bias": (lambda f: rewrite(f, **{BIAS: torch.zeros(48)}), 2, f"{BIAS} is not a weight of a Llama"),
    "a missing weight": (lambda f: rewrite(f, **{EMBEDDING: None}), 2, f"{EMBEDDING} is missing"),
    "another shape": (lambda f: rewrite(f, **{"model.norm.weight": torch.zeros(9)}), 2, "has shape (9,)"),
    "integers": (
        lambda f: rewrite(f, **{"model.norm.weight": torch.zeros(48, dtype=torch.int8)}),
        2,
        "model.norm.weight is I8; F32, F16, BF16 can be imported",
    ),
    "an output layer of its own": (
        lambda f: rewrite(f, **{"lm_head.weight": torch.zeros(61, 48)}),
        2,
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "a file cut short": (lambda f: os.truncate(f / "model.safetensors", 5000), 1, "is damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), 2, "config.json does not exist"),
    "a config that is not JSON": (lambda f: (f / "config.json").write_text("{"), 2, "cannot be parsed"),
    "another architecture": (lambda f: (f / "config.json").write_text("{}"), 2, "model_type: is None"),
    "only a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        2,
        "pytorch_model.bin is a pickle",
    ),
    "git-lfs pointers": (
        lambda f: (f / "model.safetensors").write_bytes(LFS_POINTER),
        2,
        "model.safetensors is a git-lfs pointer, not the file itself: run git lfs pull in",
    ),
    "a git-lfs pointer as config": (
        lambda f: (f / "config.json").write_bytes(LFS_POINTER),
        2,
        "config.json is a git-lfs pointer",
    ),
    "weights under the authors' names": (
        lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"),
        2,
        "consolidated.safetensors has the names of the model's authors",
    ),
    "shards without an index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        2,
        "model.safetensors.index.json, which says what model-00001-of-00002.safetensors holds: download it",
    ),
    "an end token that is none": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ["a"]}'),
        2,
        "eos_token_id: ['a'] is not a token id",
    ),
    "an index that leads out": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "../x.safetensors"}}'
        ),
        2,
        "names '../x.safetensors'",
    ),
    "an index of a file that is not there": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "x.safetensors"}}'),
        2,
        "x.safetensors is missing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_import_bad_folder_reported_leaves_nothing(
    import_hf: Any, folder: Path, tmp_path: Path, case: str
) -> None:
    damage, status, message = BAD[case]
    damage(folder)
    before = sorted(tmp_path.iterdir())
    found, out, err = import_hf(folder, "--out", tmp_path / "ours")
    assert (found, out) == (status, "")
    assert message in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_import_redundant_tensors_left_out(import_hf: Any, folder: Path, tmp_path: Path) -> None:
    """Folders of earlier versions have rotary frequencies, and tied models often the output layer."""
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    extra = {
        "lm_head.weight": embedding.clone(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }
    rewrite(folder, **extra)
    status, printed, err = import_hf(folder, "--out", tmp_path / "ours", "--json")
    assert status == 0, err
    body = json.loads(printed)
    assert body["exclude_from_loading"] == ["optimizer", "scheduler", "data", "rng"]
    assert body["num_parameters"] == sum(tensor.numel() for tensor in weights_of(tmp_path / "ours").values())
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(
        ["config.toml", "index.bin", "manifest.json", "shard_00000_of_00001.safetensors", "train_state.json"]
    )


def test_import_result_readable_by_stock_torch(import_hf: Any, folder: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    assert import_hf(folder, "--out", tmp_path / "ours")[0] == 0
    want = weights_of(tmp_path / "ours")
    state = {f"model.{name}": torch.empty_like(tensor) for name, tensor in want.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "ours")))
    assert_equal({name.removeprefix("model."): tensor for name, tensor in state.items()}, want)


# Casts


@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
def test_cast_matches_torch(source: str, target: str) -> None:
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator, dtype=torch.int64).to(
        torch.int32
    )
    values = bits.view(torch.float32)
    values = torch.cat([values, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8])])
    values = values[~values.isnan()].to(dtypes[source])
    values = values[~(values.isfinite() & ~values.to(dtypes[target]).isfinite())]  # these are refused
    raw = values.view(torch.uint8).numpy()
    found = torch.from_numpy(cast(raw, source, target).copy()).view(dtypes[target])
    assert torch.equal(found, values.to(dtypes[target]))
    assert cast(np.array([np.nan], np.float32).view(np.uint8), "F32", "BF16").tobytes() == b"\xc0\x7f"


@pytest.mark.parametrize(
    ("out", "text"), [("step/hf", "is inside"), ("step_00000100", "would look like a step")]
)
def test_export_into_or_beside_steps_refused(ckpt: Ckpt, tmp_path: Path, out: str, text: str) -> None:
    """verify would complain of the one, retention would delete the other."""
    step = save(tmp_path, make_model())
    before = sorted(tmp_path.rglob("*"))
    done = ckpt("export", step, "--out", tmp_path / out.replace("step/", f"{step.name}/"))
    assert done.status == 2
    assert text in done.err
    assert [path for path in sorted(tmp_path.rglob("*")) if "holds" not in path.parts] == before
