"""Files, what they extend, the command line over them, where values came from, and TOML out again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.config.checkpoint_rules import CONTROL_CHARACTER
from kempnerforge.config.overrides import parse_value
from kempnerforge.config.reference import json_schema
from kempnerforge.config.schema import JobConfig, RopeScalingConfig, load_job
from kempnerforge.errors import ConfigError

TEXT = '[data]\ntext = "x"\n'


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_config_extends_states_only_differences(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", f"{TEXT}[train]\nseed = 1\nseq_len = 64\n[optimizer]\nbetas = [0.5, 0.6]\n")
    write(tmp_path, "families/mid.toml", 'extends = "../base.toml"\n[train]\nseed = 2\nmax_steps = 5\n')
    leaf = write(tmp_path, "families/leaf.toml", 'extends = "mid.toml"\n[train]\nseed = 3\n')
    loaded = load_job(leaf, ["--train.batch_size=2", "--optimizer.lr", "1e-2"])
    train = loaded.job.train
    assert (train.seed, train.max_steps, train.seq_len, train.batch_size) == (3, 5, 64, 2)
    assert loaded.job.optimizer.betas == (0.5, 0.6)
    assert loaded.job.optimizer.lr == 0.01
    base, mid = str(tmp_path / "base.toml"), str(tmp_path / "families/mid.toml")
    expected = {
        "train.seed": str(leaf),
        "train.max_steps": mid,
        "train.seq_len": base,
        "train.batch_size": "command line",
        "optimizer.betas": base,
        "optimizer.lr": "command line",
        "optimizer.eps": "default",
        "data.text": base,
        "data.dataset_path": "default",
    }
    assert {key: loaded.sources[key] for key in expected} == expected
    assert loaded.sources.keys() == loaded.job.flat().keys()


def test_config_extends_merges_tables_replaces_lists(tmp_path: Path) -> None:
    scaling = "factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192"
    write(tmp_path, "base.toml", f'[data]\ntext = ["a", "b"]\n[model]\nrope_scaling = {{{scaling}}}\n')
    leaf = write(
        tmp_path,
        "leaf.toml",
        'extends = "base.toml"\n[data]\ntext = ["c"]\n[model.rope_scaling]\nfactor = 16\n',
    )
    loaded = load_job(leaf, ["--model.rope_scaling.low_freq_factor=2"])
    assert loaded.job.data.text == ["c"]
    assert loaded.job.model.rope_scaling == RopeScalingConfig(
        factor=16, low_freq_factor=2, high_freq_factor=4, original_max_position_embeddings=8192
    )
    names = ["factor", "low_freq_factor", "high_freq_factor"]
    assert [loaded.sources[f"model.rope_scaling.{name}"] for name in names] == [
        str(leaf),
        "command line",
        str(tmp_path / "base.toml"),
    ]
    unset = load_job(leaf, ["--model.rope_scaling=none"])
    assert unset.job.model.rope_scaling is None
    assert unset.sources["model.rope_scaling"] == "command line"


def test_config_extends_none_unsets_base_value(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", TEXT)
    leaf = write(
        tmp_path, "leaf.toml", 'extends = "base.toml"\n[data]\ntext = "none"\ndataset_path = "tokens"\n'
    )
    loaded = load_job(leaf)
    assert (loaded.job.data.text, loaded.job.data.dataset_path) == (None, "tokens")
    assert loaded.sources["data.text"] == str(leaf)


def test_config_override_repairs_file(tmp_path: Path) -> None:
    file = write(tmp_path, "bad.toml", f"{TEXT}[train]\nseed = 1.5\n")
    with pytest.raises(ConfigError, match=r"train.seed: 1.5 is not an integer"):
        load_job(file)
    assert load_job(file, ["--train.seed=2"]).job.train.seed == 2


GOOD_OVERRIDES: list[tuple[list[str], str, Any]] = [
    (["--run.name=123"], "run.name", "123"),
    (["--run.name", "2024-01-01"], "run.name", "2024-01-01"),
    (["--run.name=true"], "run.name", "true"),
    (['--run.name="quoted"'], "run.name", "quoted"),
    (["--run.dir=/a=b"], "run.dir", "/a=b"),
    (["--run.dir=/a", "--run.dir=none"], "run.dir", None),
    (["--run.dir=null"], "run.dir", None),
    (["--data.text=*.py"], "data.text", "*.py"),
    (["--data.text=7"], "data.text", "7"),
    (['--data.text=["a", "b"]'], "data.text", ["a", "b"]),
    (["--model.n_kv_heads=2", "--model.n_kv_heads=null"], "model.n_kv_heads", None),
    (["--train.activation_checkpointing=none"], "train.activation_checkpointing", "none"),
    (["--train.max_steps=1_000"], "train.max_steps", 1000),
    (["--train.seed=1", "--train.seed=2"], "train.seed", 2),
    (["--train.compile_model=true"], "train.compile_model", True),
    (["--scheduler.name", "wsd"], "scheduler.name", "wsd"),
    (["--distributed.dp_shard", "-1"], "distributed.dp_shard", -1),
    (["--optimizer.betas=[0.8, 0.9]"], "optimizer.betas", [0.8, 0.9]),
    (["--optimizer.lr=1"], "optimizer.lr", 1.0),
    (["--optimizer.lr=.001"], "optimizer.lr", 0.001),
    (["--run.dir=.1"], "run.dir", ".1"),
    (
        ["--checkpoint.load_path=x", '--checkpoint.exclude_from_loading=["rng"]'],
        "checkpoint.exclude_from_loading",
        ["rng"],
    ),
]


@pytest.mark.parametrize(("overrides", "key", "value"), GOOD_OVERRIDES)
def test_config_override_valid_sets_value(overrides: list[str], key: str, value: Any) -> None:
    loaded = load_job(None, ["--data.text=x", *overrides])
    flat = loaded.job.flat()
    assert flat[key] == value
    assert type(flat[key]) is type(value)
    assert loaded.sources[key] == "command line"


BAD_OVERRIDES = [
    (["--train.batchsize=1"], "--train.batchsize", "is not a known key", "did you mean train.batch_size?"),
    (["--trian.batch_size=1"], "--trian.batch_size", "is not a known key", "did you mean train.batch_size?"),
    (["--lr=1"], "--lr", "is not a known key", "did you mean optimizer.lr?"),
    (["--modle.layers=1"], "--modle.layers", "is not a known key", "did you mean model.n_layers?"),
    (["--qqq"], "--qqq", "is not a known key", "sections: run, model"),
    (["--extends=x.toml"], "--extends", "is not a known key", "sections: run"),
    (["--train.seed"], "--train.seed", "has no value", "write --train.seed=VALUE; allowed: integer >= 0"),
    (["--train.seed", "--run.name=a"], "--train.seed", "has no value", "VALUE"),
    (["--train.seed="], "train.seed", '"" is empty', "integer >= 0"),
    (["--train.seed=" + "9" * 5000], "train.seed", "is not an integer", "integer >= 0"),
    (["--train.seed=2 3"], "train.seed", '"2 3" is not an integer', "integer >= 0"),
    (["--train.compile_model=True"], "train.compile_model", '"True" is not true or false', "true or false"),
    (["--model=3"], "model", "3 is not a table", "write [model]"),
    (["--model.dim.x=3"], "--model.dim.x", "is not a known key", ""),
    (["train.seed=1"], "train.seed=1", "is not an override", "write --section.key=value"),
    (["--train.seed=1\nbatch_size=2"], "train.seed", "is not an integer", ""),
]


@pytest.mark.parametrize(("overrides", "key", "problem", "allowed"), BAD_OVERRIDES)
def test_config_override_invalid_is_fault(overrides: list[str], key: str, problem: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(None, ["--data.text=x", *overrides])
    [fault] = caught.value.faults
    assert fault.key == key
    assert problem in fault.problem
    assert allowed in fault.allowed
    assert fault.source == "command line"


BAD_FILES = [
    (
        {"a.toml": "[train\n"},
        "{a}: is not valid TOML: Expected ']' at the end of a table declaration in line 1, column 7: [train",
    ),
    (
        {"a.toml": "[train]\nseed = 1\nseed = 2\n"},
        "{a}: is not valid TOML: Cannot overwrite a value in line 3, column 9: seed = 2; this key is",
    ),
    ({"a.toml": "[run]\nname = quickstart\n"}, "in line 2, column 8: name = quickstart; text needs quotes"),
    ({"a.toml": '[run]\nname = "quick\n'}, 'name = "quick; a quotation mark is missing'),
    ({"a.toml": "[optimizer]\nlr = .001\n"}, "line 2, column 6: lr = .001; write 0.001: a number has digits"),
    ({"a.toml": "[optimizer]\nlr = -.5e-3\n"}, "write -0.5e-3: a number has digits"),
    ({"a.toml": "[run]\n[run]\n"}, "in line 2, column 5: [run]; this table is there twice"),
    ({"a.toml": "x = ["}, "{a}: is not valid TOML: Invalid value (at end of document)"),
    ({"b.toml": ""}, "{a}: does not exist; in {folder} there are: b.toml"),
    ({"a.toml": 'extends = "b.toml"'}, "extends: {b} (which {a} extends) does not exist"),
    ({"a.toml": 'extends = "b.toml"', "b.toml": "x = ="}, "extends: {b} (which {a} extends) is not valid"),
    (
        {"a.toml": 'extends = "b.toml"', "b.toml": 'extends = "a.toml"'},
        "forms a cycle: a.toml -> b.toml -> a.toml",
    ),
    ({"a.toml": 'extends = "a.toml"'}, "forms a cycle: a.toml -> a.toml"),
    ({"a.toml": "extends = 3"}, "extends: 3 is not a path"),
    ({"a.toml/x": ""}, "{a}: is a folder; there are no TOML files in {a}"),
    ({"a.toml/b.toml": ""}, "{a}: is a folder; in {a} there are: b.toml"),
    ({"a.toml/b.toml": "", "c.toml": ""}, "{a}: is a folder"),
    ({"a.toml": 'extends = "b\\u0000.toml"'}, "cannot be read: embedded null byte"),
]


@pytest.mark.parametrize(("files", "message"), BAD_FILES)
def test_config_unreadable_file_is_fault(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        write(tmp_path, name, text)
    with pytest.raises(ConfigError) as caught:
        load_job(tmp_path / "a.toml")
    expected = message.format(a=tmp_path / "a.toml", b=tmp_path / "b.toml", folder=tmp_path)
    assert expected in str(caught.value)
    assert "extends" in str(caught.value) or len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_status == 2


def test_config_file_with_byte_order_mark_loads(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b'\xef\xbb\xbf[run]\nname = "marked"\n[data]\ntext = "x"\n')
    assert load_job(tmp_path / "a.toml").job.run.name == "marked"


def test_config_extends_expands_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASES", str(tmp_path / "bases"))
    write(tmp_path, "bases/b.toml", '[run]\nname = "based"\n[data]\ntext = "x"\n')
    write(tmp_path, "a.toml", 'extends = "$BASES/b.toml"')
    assert load_job(tmp_path / "a.toml").job.run.name == "based"
    monkeypatch.delenv("BASES")
    with pytest.raises(ConfigError, match=r"\$BASES is not set"):
        load_job(tmp_path / "a.toml")


def test_config_file_not_utf8_is_fault(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe[train]")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_job(tmp_path / "a.toml")


def test_config_error_lists_every_fault_with_source(tmp_path: Path) -> None:
    file = write(tmp_path, "a.toml", f"{TEXT}[train]\nseed = 1.5\n")
    with pytest.raises(ConfigError) as caught:
        load_job(file, ["--train.batch_size=0"])
    assert str(caught.value).splitlines() == [
        f"{file}: 2 faults in the configuration",
        "  train.batch_size: 0 is too small; allowed: integer >= 1  [command line]",
        f"  train.seed: 1.5 is not an integer; allowed: integer >= 0 and < 9223372036854775808  [{file}]",
    ]


names = st.text(min_size=1, max_size=20).filter(lambda text: text not in ("none", "null"))
fractions = st.floats(0, 1, exclude_max=True)
run_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
plain_paths = names.filter(
    lambda text: "{" not in text and "://" not in text and not CONTROL_CHARACTER.search(text)
)


@st.composite
def jobs(draw: st.DrawFn) -> JobConfig:
    """Valid jobs, with odd strings and numbers wherever any are allowed."""
    some = lambda strategy: draw(st.none() | strategy)  # noqa: E731
    scaling = RopeScalingConfig(
        factor=draw(st.floats(1, 1e300)),
        low_freq_factor=draw(st.floats(1e-300, 1)),
        high_freq_factor=draw(st.floats(1, 1e300, exclude_min=True)),
        original_max_position_embeddings=draw(st.integers(1, 2**70)),
    )
    load_path = some(plain_paths)
    parts = st.lists(st.sampled_from(["model", "optimizer", "scheduler", "data", "rng"]))
    tree = {
        "run": {"name": draw(run_names), "dir": some(plain_paths)},
        "model": {
            "rope_scaling": some(st.just(scaling.model_dump())),
            "ffn_hidden_dim": some(st.integers(1, 2**40)),
        },
        "data": {
            "text": draw(names | st.lists(names, min_size=1)),
            "tokenizer": draw(names),
            "val_fraction": draw(fractions),
        },
        "train": {"seed": draw(st.integers(0, 2**63 - 1)), "compile_model": draw(st.booleans())},
        "optimizer": {"lr": draw(st.floats(1e-300, 1e300)), "betas": [draw(fractions), draw(fractions)]},
        "checkpoint": {"load_path": load_path, "exclude_from_loading": draw(parts) if load_path else []},
    }
    return JobConfig.model_validate(tree)


@settings(max_examples=150, deadline=None)
@given(jobs())
def test_config_toml_round_trip_equal(job: JobConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(job.to_toml(), encoding="utf-8", newline="")
        assert load_job(file).job == job


@given(jobs())
@settings(max_examples=30, deadline=None)
def test_config_flat_is_json_and_complete(job: JobConfig) -> None:
    flat = job.flat()
    assert json.loads(json.dumps(flat)) == flat
    assert flat["train.seed"] == job.train.seed
    assert flat["optimizer.betas"] == list(job.optimizer.betas or ())
    assert flat["checkpoint.async_mode"] == "disabled"


@given(st.text())
def test_config_override_any_text_parses(text: str) -> None:
    parse_value(text, as_text=False)
    assert isinstance(parse_value(text, as_text=True), (str, list))


def test_config_json_schema_has_extends_and_none() -> None:
    schema = json_schema()
    assert schema["properties"]["extends"]["type"] == "string"
    assert set(schema["properties"]) == {*JobConfig.model_fields, "extends"}
    model = schema["$defs"]["ModelConfig"]["properties"]
    assert model["n_kv_heads"]["anyOf"] == [{"minimum": 1, "type": "integer"}, {"const": "none"}]
    assert model["dim"]["description"] == "Width of the residual stream."
    assert '"null"' not in json.dumps(schema)


def test_config_defaults_toml_has_every_section(tmp_path: Path) -> None:
    job = load_job(None, ["--data.text=x"]).job
    tree = tomli.loads(job.to_toml())
    assert set(tree) == set(JobConfig.model_fields)
    assert "dir" not in tree["run"]
