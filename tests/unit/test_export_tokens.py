"""Exports have the tokenizer and the end token: of the imported model, of the data, or a word on why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ckpt_cli import Ckpt
from support.tokenizers import make_tokenizer
from support.weight_cases import make_model, save
from tokenizers import Tokenizer

from kempnerforge.cli import app
from kempnerforge.data.prepare import prepare
from kempnerforge.data.tokenizer import ByteTokenizer, load_tokenizer
from kempnerforge.data.tokenizer import Tokenizer as OurTokenizer

pytest_plugins = ["support.ckpt_fixtures"]
TEXT = "def hello(world):\n    return 1\n"


def import_hf(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kempnerforge", "import", "hf", str(folder), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 0


def token_settings(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The end token and BOS of config.json, and generation_config.json."""
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    return config["eos_token_id"], config["bos_token_id"], generation


def prepared(folder: Path, tokenizer: OurTokenizer) -> Path:
    (folder / "text.txt").write_text(TEXT)
    prepare([str(folder / "text.txt")], folder / "tokens", tokenizer, val_fraction=0.0)
    return folder / "tokens"


def test_export_of_byte_model_has_its_tokenizer(ckpt: Ckpt, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    step = save(tmp_path, make_model(vocab_size=300), extra='[data]\ntext = "x"\ntokenizer = "bytes"\n')
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert (done.status, done.err) == (0, "")
    assert token_settings(tmp_path / "hf")[:2] == (256, 256)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (loaded.eos_token_id, loaded("é\n").input_ids) == (256, [256, 0xC3, 0xA9, 10])
    assert loaded.decode([256, 0xC3, 0xA9, 10], skip_special_tokens=True) == "é\n"


@pytest.mark.parametrize("kind", ["bytes", "tokenizer.json"])
@pytest.mark.parametrize("has_data", [True, False])
def test_export_of_prepared_data_has_tokenizer(ckpt: Ckpt, tmp_path: Path, kind: str, has_data: bool) -> None:
    """The step records what training does; bytes need no file."""
    make_tokenizer(tmp_path / "tok" / "tokenizer.json")
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(str(tmp_path / "tok"))
    data = prepared(tmp_path, tokenizer)
    assert (data / "tokenizer.json").exists() is (kind != "bytes")
    recorded = {"digest": tokenizer.digest, "separator_id": str(tokenizer.separator_id)}
    if kind != "bytes":
        recorded["path"] = str(data / "tokenizer.json")
    step = save(
        tmp_path,
        make_model(vocab_size=300),
        extra=f'[data]\ndataset_path = "{data}"\n',
        tokenizer=recorded,
    )
    if not has_data:
        data.rename(tmp_path / "moved")
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert done.status == 0
    assert token_settings(tmp_path / "hf")[0] == tokenizer.separator_id
    if kind == "bytes" or has_data:
        stored = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
        assert stored.encode(TEXT, add_special_tokens=False).ids[:4] == tokenizer.encode(TEXT).tolist()[:4]
        assert done.err == ""
    else:
        assert f"the tokenizer {data}/tokenizer.json does not exist; give --tokenizer FILE" in done.err
        assert "the export has no tokenizer" in done.err


def test_export_after_given_tokens_has_them(ckpt: Ckpt, tmp_path: Path) -> None:
    """The tokens that ``eos_token`` and ``bos_token`` name are those of the export and its tokenizer."""
    from transformers import AutoTokenizer

    made = make_tokenizer(tmp_path / "tok" / "tokenizer.json")
    made.add_special_tokens(["<stop>"])
    made.save(str(tmp_path / "tok" / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tok"), eos="<stop>", bos="<begin>")
    data = prepared(tmp_path, tokenizer)
    ids = {"separator_id": str(made.token_to_id("<stop>")), "bos_id": str(made.token_to_id("<begin>"))}
    prepared_data = {"digest": tokenizer.digest, "path": str(data / "tokenizer.json"), **ids}
    text_data = {**prepared_data, "path": str(tmp_path / "tok" / "tokenizer.json")}
    for name, section, recorded in (
        ("prepared", f'dataset_path = "{data}"', prepared_data),
        ("text", 'text = "x"\neos_token = "<stop>"\nbos_token = "<begin>"', text_data),
    ):
        folder = tmp_path / name
        folder.mkdir()
        model = make_model(vocab_size=made.get_vocab_size())
        step = save(folder, model, extra=f"[data]\n{section}\n", tokenizer=recorded)
        done = ckpt("export", step, "--out", folder / "hf")
        assert (done.status, done.err) == (0, "")
        expected = (made.token_to_id("<stop>"), made.token_to_id("<begin>"))
        assert token_settings(folder / "hf")[:2] == expected
    loaded = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "hf")
    assert (loaded.eos_token, loaded.bos_token) == ("<stop>", "<begin>")


def test_export_of_older_step_reads_the_index(ckpt: Ckpt, tmp_path: Path) -> None:
    """Steps of earlier versions record no separator, and their data have no tokenizer."""
    make_tokenizer(tmp_path / "tok" / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tok"))
    data = prepared(tmp_path, tokenizer)
    (data / "tokenizer.json").unlink()
    extra = f'[data]\ndataset_path = "{data}"\n'
    step = save(tmp_path, make_model(vocab_size=300), extra=extra, tokenizer={"digest": tokenizer.digest})
    assert ckpt("export", step, "--out", tmp_path / "hf").status == 0
    assert token_settings(tmp_path / "hf")[0] == tokenizer.separator_id


def test_export_without_known_tokenizer_says_so(ckpt: Ckpt, tmp_path: Path) -> None:
    step = save(tmp_path, make_model(), extra='[data]\ndataset_path = "shards_of.npy"\n')
    done = ckpt("export", step, "--out", tmp_path / "hf")
    assert done.status == 0
    assert done.err.splitlines() == [
        "the tokenizer shards_of.npy/tokenizer.json does not exist; give --tokenizer FILE",
        "the export has no tokenizer",
        "the export names no end token: transformers generates until max_new_tokens",
    ]
    assert token_settings(tmp_path / "hf")[0] is None
    done = ckpt("export", save(tmp_path / "own", make_model()), "--out", tmp_path / "b")
    assert "the tokenizer of step_00000007 is not recorded; give --tokenizer FILE" in done.err


@pytest.fixture
def hf_folder(ckpt: Ckpt, tmp_path: Path) -> Path:
    """A model with two end tokens, a BOS, sampling settings, and a tokenizer."""
    assert (
        ckpt("export", save(tmp_path / "s", make_model(vocab_size=300)), "--out", tmp_path / "hf").status == 0
    )
    settings = {"bos_token_id": 0, "eos_token_id": [5, 7], "do_sample": True, "temperature": 0.6}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(settings))
    make_tokenizer(tmp_path / "hf" / "tokenizer.json")
    return tmp_path / "hf"


def test_export_of_imported_model_keeps_its_settings(
    ckpt: Ckpt, tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_hf(hf_folder, tmp_path / "ours", monkeypatch)
    done = ckpt("export", tmp_path / "ours", "--out", tmp_path / "again")
    assert (done.status, done.err) == (0, "")
    settings = {"bos_token_id": 0, "eos_token_id": [5, 7], "do_sample": True, "temperature": 0.6}
    assert token_settings(tmp_path / "again") == ([5, 7], 0, settings)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (hf_folder / "tokenizer.json").read_bytes()
    # A run that began with these weights, and a run that began with those of that run.
    data = '[data]\ntext = "x"\ntokenizer = "bytes"\n'
    first = save(
        tmp_path / "first",
        make_model(vocab_size=300),
        extra=data,
        tokenizer={"load_path": str(tmp_path / "ours"), "separator_id": "256"},
    )
    second = save(
        tmp_path / "second",
        make_model(vocab_size=300),
        extra=f'{data}[checkpoint]\nload_path = "{first}"\n',
    )
    for number, step in enumerate((first, second)):
        done = ckpt("export", step, "--out", tmp_path / f"tuned{number}")
        assert token_settings(tmp_path / f"tuned{number}") == ([5, 7], 0, settings)
        assert "end with token 256, which is not an end token of the imported model" in done.err
    (tmp_path / "ours" / "manifest.json").unlink()
    done = ckpt("export", first, "--out", tmp_path / "orphan")
    assert "the end token of the weights that the run began with is unknown" in done.err
    assert token_settings(tmp_path / "orphan")[0] == 256


def test_import_settings_default_as_in_transformers(
    ckpt: Ckpt, tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    (hf_folder / "generation_config.json").unlink()
    config = json.loads((hf_folder / "config.json").read_text())
    for number, changes in enumerate(({}, {"eos_token_id": 9, "bos_token_id": None})):
        kept = {key: value for key, value in config.items() if not key.endswith("token_id")}
        (hf_folder / "config.json").write_text(json.dumps(kept | changes))
        import_hf(hf_folder, tmp_path / f"in{number}", monkeypatch)
        assert ckpt("export", tmp_path / f"in{number}", "--out", tmp_path / f"out{number}").status == 0
        before, after = (AutoConfig.from_pretrained(path) for path in (hf_folder, tmp_path / f"out{number}"))
        assert after.eos_token_id == before.eos_token_id
        assert after.bos_token_id == before.bos_token_id


def test_exported_model_stops_in_transformers(ckpt: Ckpt, tmp_path: Path) -> None:
    """A model that always predicts the separator: generate() ends at once instead of at its limit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = make_model(vocab_size=257)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        model.output.weight.zero_()
        model.tok_embeddings.weight[:, 0] = 50.0
        model.output.weight[256, 0] = 1.0
    step = save(tmp_path, model, extra='[data]\ntext = "x"\n')
    assert ckpt("export", step, "--out", tmp_path / "hf").status == 0
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    said = loaded.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert said[0].tolist() == [256, 97, 98, 256]
