"""One section at a time: what values are taken, and what is said about those that are not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from kempnerforge.config import foreign_keys
from kempnerforge.config.schema import (
    AsyncCheckpointMode,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    JobConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SchedulerConfig,
    load_job,
)
from kempnerforge.config.suggestions import find_field
from kempnerforge.errors import ConfigError, ConfigIssue


def faults_of(tmp_path: Path, text: str, *overrides: str) -> dict[str, ConfigIssue]:
    """Key -> fault for the file ``text``, which must have some; no key may have two."""
    file = tmp_path / "job.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_job(file, overrides)
    keys = [fault.key for fault in caught.value.faults]
    assert len(keys) == len(set(keys)), keys
    return {fault.key: fault for fault in caught.value.faults}


BAD_VALUES = [
    # key, value in TOML, what is wrong, what is allowed
    ("train.batch_size", "10.9", "10.9 is not an integer", "allowed: integer >= 1"),
    ("train.batch_size", "8.0", "8.0 is not an integer", "allowed: integer >= 1"),
    ("train.batch_size", '"8"', '"8" is not an integer', "allowed: integer >= 1"),
    ("train.batch_size", "true", "true is not an integer", "allowed: integer >= 1"),
    ("train.batch_size", "0", "0 is too small", "allowed: integer >= 1"),
    ("train.seed", "9223372036854775808", "is too large", "allowed: integer >= 0"),
    ("train.compile_model", '"ture"', '"ture" is not true or false', "allowed: true or false"),
    ("train.compile_model", "1", "1 is not true or false", "allowed: true or false"),
    (
        "train.mixed_precision",
        '"fp16"',
        '"fp16" is not allowed',
        'did you mean "bf16"? allowed: "bf16" | "fp32"',
    ),
    ("train.activation_checkpointing", "1", "1 is not allowed", '"none" | "selective" | "full"'),
    ("optimizer.lr", "nan", "nan is not a finite number", "allowed: number > 0"),
    ("optimizer.lr", "inf", "inf is not a finite number", "allowed: number > 0"),
    ("optimizer.lr", "1e400", "inf is not a finite number", "allowed: number > 0"),
    ("optimizer.lr", "0", "0 is too small", "allowed: number > 0"),
    ("optimizer.lr", "true", "true is not a number", "allowed: number > 0"),
    ("optimizer.lr", "2024-01-01", "2024-01-01 is not a number", "allowed: number > 0"),
    ("optimizer.betas", "[0.9, 1.0]", "[0.9, 1.0] is not allowed", "number >= 0 and < 1"),
    ("optimizer.betas", "[0.9]", "[0.9] is not allowed", "[number >= 0 and < 1, number"),
    ("optimizer.betas", "0.9", "0.9 is not a list", "[number >= 0 and < 1, number"),
    ("optimizer.betas", '[0.9, "0.95"]', '[0.9, "0.95"] is not allowed', "number >= 0"),
    (
        "scheduler.name",
        '"cosin"',
        '"cosin" is not a known scheduler',
        'did you mean "cosine"?',
    ),
    ("scheduler.min_lr_ratio", "1.5", "1.5 is too large", "number >= 0 and <= 1"),
    ("run.name", '"../up"', '"../up" is not allowed', "text matching"),
    ("run.name", '"a b"', '"a b" is not allowed', "text matching"),
    ("run.name", "123", "123 is not text", "text matching"),
    ("run.dir", '""', '"" is empty', "allowed: text or none"),
    ("data.text", "[]", "[] is empty", "allowed: text or list of text or none"),
    ("data.text", "5", "5 is not allowed", "allowed: text or list of text or none"),
    ("data.text", '["a", 5]', '["a", 5] is not allowed', "list of text"),
    ("data.val_fraction", "1.0", "1.0 is too large", "number >= 0 and < 1"),
    ("distributed.dp_shard", "0", "0 is not allowed", "allowed: -1 or integer >= 1"),
    ("distributed.dp_shard", "-1.0", "-1.0 is not an integer", "allowed: -1 or integer >= 1"),
    ("distributed.timeout_s", "0", "0 is too small", "allowed: number > 0"),
    ("distributed.timeout_s", "1e9", "1000000000.0 is too large", "number > 0 and <= 604800"),
    ("checkpoint.async_mode", '"asink"', '"asink" is not allowed', 'did you mean "async"?'),
    ("checkpoint.exclude_from_loading", '["optimiser"]', "is not allowed", 'did you mean "optimizer"?'),
    ("checkpoint.exclude_from_loading", '"rng"', '"rng" is not a list', 'list of "model"'),
    ("checkpoint.interval", '"sometimes"', '"sometimes" is not allowed', 'allowed: integer >= 0 or "auto"'),
    ("checkpoint.interval", '"atuo"', '"atuo" is not allowed', 'did you mean "auto"? allowed: integer'),
    ("checkpoint.interval", "-1", "-1 is not allowed", 'allowed: integer >= 0 or "auto"'),
    ("checkpoint.interval", "2.5", "2.5 is not allowed", 'allowed: integer >= 0 or "auto"'),
    ("checkpoint.interval", "true", "true is not allowed", 'allowed: integer >= 0 or "auto"'),
    ("checkpoint.max_overhead_pct", "0", "0 is too small", "number > 0 and <= 100 or none"),
    ("checkpoint.max_overhead_pct", "101", "101 is too large", "number > 0 and <= 100 or none"),
    ("checkpoint.expected_mtti_hours", '"day"', '"day" is not a number', "number > 0 or none"),
    ("checkpoint.interval_minutes", "0", "0 is too small", "allowed: number > 0 or none"),
    ("checkpoint.at_steps", "[0]", "[0] is not allowed", "list of integer >= 1"),
    ("checkpoint.keep_steps", "[1.5]", "[1.5] is not allowed", "list of integer >= 0"),
    ("checkpoint.keep_best_n", "0", "0 is too small", "integer >= 1 or none"),
    ("checkpoint.best_mode", '"lowest"', '"lowest" is not allowed', '"min" | "max"'),
    ("checkpoint.dyn_ckpt_window", "64", "64 is not a table", "table with start, stop, strategy"),
    ("model.rope_scaling", "8", "8 is not a table", "allowed: table with factor, low_freq_factor"),
    ("metrics.wandb_project", '""', '"" is empty', "allowed: text"),
]


@pytest.mark.parametrize(("key", "value", "problem", "allowed"), BAD_VALUES)
def test_config_bad_value_is_one_fault_with_allowed(
    tmp_path: Path, key: str, value: str, problem: str, allowed: str
) -> None:
    table, _, name = key.partition(".")
    source = 'text = "x"' if table == "data" and name != "text" else ""
    rest = "" if table == "data" else '[data]\ntext = "x"\n'
    faults = faults_of(tmp_path, f"{rest}[{table}]\n{source}\n{name} = {value}\n")
    assert list(faults) == [key]
    assert problem in faults[key].problem
    assert allowed in faults[key].allowed
    assert faults[key].source == str(tmp_path / "job.toml")


UNKNOWN_KEYS = [
    ("train", "batchsize = 8", "train.batchsize", "did you mean train.batch_size?"),
    ("train", "lr = 0.1", "train.lr", "did you mean optimizer.lr?"),
    ("train", "name = 1", "train.name", "known in [train]: global_batch_size"),
    ("model", "type = 'llama'", "model.type", "use model.name"),
    ("model", "kind = 'llama'", "model.kind", "known in [model]: name"),
    ("train", "iters = 1", "train.iters", "known in [train]: global_batch_size"),
    ("train", "batch = 1", "train.batch", "did you mean train.global_batch_size or train.batch_size?"),
    ("train", "stepz = 1", "train.stepz", "did you mean train.max_steps or train.max_skipped_steps?"),
    ("optim", "lr = 1", "optim", "did you mean [optimizer]?"),
    ("checkpoint", "type = 1", "checkpoint.type", "known in [checkpoint]: dir"),
    ("modle", "dim = 8", "modle", "did you mean [model]?"),
    ("model", "hidden = {}", "model.hidden", "did you mean"),
    ("eval", "zzz = 1", "eval.zzz", "known in [eval]: interval, num_batches"),
    ("wholly", "zzz = 1", "wholly", "sections: run, model, data"),
    (
        "model.rope_scaling",
        "factr = 8",
        "model.rope_scaling.factr",
        "did you mean model.rope_scaling.factor?",
    ),
]


@pytest.mark.parametrize(("table", "line", "key", "hint"), UNKNOWN_KEYS)
def test_config_unknown_key_suggests_nearest(
    tmp_path: Path, table: str, line: str, key: str, hint: str
) -> None:
    faults = faults_of(tmp_path, f'[data]\ntext = "x"\n[{table}]\n{line}\n')
    assert hint in faults[key].allowed
    assert "is not a known" in faults[key].problem


FOREIGN = """
[job]
dump_folder = "out"
[metrics]
log_freq = 10
[lr_scheduler]
warmup_steps = 200
[train]
grad_accum_steps = 4
[training]
local_batch_size = 1
steps = 1000
gc_freq = 50
[parallelism]
data_parallel_shard_degree = -1
[checkpoint]
enable = true
folder = "checkpoint"
export_dtype = "float32"
[activation_checkpoint]
mode = "selective"
[data]
text = "x"
"""


def test_config_keys_of_other_programs_say_what_to_write(tmp_path: Path) -> None:
    """A config with keys of torchtitan and of the public KempnerForge: one line for each key."""
    faults = faults_of(tmp_path, FOREIGN, "--gradient_accumulation_steps=2")
    assert {key: fault.allowed for key, fault in faults.items()} == {
        "job.dump_folder": "use run.dir",
        "metrics.log_freq": "use metrics.log_interval",
        "lr_scheduler.warmup_steps": "use scheduler.warmup_steps",
        "train.grad_accum_steps": foreign_keys.LAST_PARTS["grad_accum_steps"],
        "--gradient_accumulation_steps": foreign_keys.LAST_PARTS["grad_accum_steps"],
        "training.local_batch_size": "use train.batch_size",
        "training.steps": "use train.max_steps",
        "training.gc_freq": "it may have no counterpart; use [train]",
        "parallelism.data_parallel_shard_degree": "use distributed.dp_shard",
        "checkpoint.enable": foreign_keys.KEYS["checkpoint.enable"],
        "checkpoint.folder": "use checkpoint.dir",
        "checkpoint.export_dtype": 'did you mean "fp32"? allowed: "bf16" | "fp16" | "fp32"',
        "activation_checkpoint.mode": "use train.activation_checkpointing",
    }


def test_config_replacements_of_foreign_keys_exist() -> None:
    texts = [*foreign_keys.KEYS.values(), *foreign_keys.LAST_PARTS.values(), *foreign_keys.SECTIONS.values()]
    sections = "|".join(JobConfig.model_fields)
    named = {key for text in texts for key in re.findall(rf"\b(?:{sections})\.[a-z_]+", text)}
    assert len(named) > 30
    assert [key for key in sorted(named) if find_field(key, JobConfig) is None] == ["metrics.jsonl"]


def test_config_stray_key_or_scalar_section_is_fault(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, 'lr = 0.1\nmodel = 3\n[data]\ntext = "x"\n')
    assert faults["lr"].allowed == "did you mean optimizer.lr?"
    assert faults["model"].problem == "3 is not a table"


def test_config_rope_scaling_missing_keys_named(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, '[data]\ntext = "x"\n[model.rope_scaling]\nfactor = 8\n')
    missing = ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    assert list(faults) == [f"model.rope_scaling.{name}" for name in missing]
    assert {fault.problem for fault in faults.values()} == {"is missing"}


def test_config_many_faults_reported_at_once(tmp_path: Path) -> None:
    """Wrong types in some sections, and rules between the sections that are sound."""
    text = """
    [run]
    nam = "x"
    [model]
    n_heads = 3
    [train]
    batch_size = 2.5
    [optimizer]
    lr = nan
    [eval]
    interval = 5
    [data]
    text = "x"
    val_fraction = 0.0
    """
    faults = faults_of(tmp_path, text, "--scheduler.nme=wsd")
    assert set(faults) == {
        "run.nam",
        "train.batch_size",
        "optimizer.lr",
        "model.dim",
        "eval.interval",
        "--scheduler.nme",
    }
    assert faults["model.dim"].source == "default"
    assert faults["--scheduler.nme"].source == "command line"


def test_config_integer_and_mode_values_converted() -> None:
    assert OptimizerConfig(lr=1).lr == 1.0
    assert CheckpointConfig.model_validate({"async_mode": "async_with_pinned_mem"}).async_mode is (
        AsyncCheckpointMode.async_pinned
    )
    assert [mode.value for mode in AsyncCheckpointMode] == ["disabled", "async", "async_with_pinned_mem"]
    assert AsyncCheckpointMode.async_ == "async"


def test_config_constructor_names_key_and_nearest() -> None:
    """In a loop of one's own a section is made without a file. pydantic's own entrance stays pydantic's."""
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig(intervall=10)  # type: ignore[call-arg]
    expected = (
        "checkpoint.intervall: is not a known key; did you mean checkpoint.interval?  [CheckpointConfig]"
    )
    assert str(caught.value) == expected
    assert caught.value.__cause__ is None
    with pytest.raises(ConfigError, match=r"checkpoint\.dyn_ckpt_window\.strt: .*dyn_ckpt_window\.start"):
        CheckpointConfig(dyn_ckpt_window={"strt": 1, "stop": 2})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"trian: .* did you mean \[train\]"):
        JobConfig(trian={})  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        CheckpointConfig.model_validate({"intervall": 10})
    with pytest.raises(ValidationError):
        JobConfig.model_validate({"checkpoint": {"intervall": 10}})


def test_config_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DistributedConfig().tp = 2  # type: ignore[misc]


def test_config_every_key_documented() -> None:
    from kempnerforge.config.field_docs import walk_keys

    undocumented = [key.name for key in walk_keys(JobConfig) if not key.doc.endswith(".")]
    assert undocumented == []


PUBLISHED = [
    ({"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000}, 6_738_415_616),
    ({"dim": 5120, "n_layers": 40, "n_heads": 40, "vocab_size": 32000}, 13_015_864_320),
    (
        {
            "dim": 8192,
            "n_layers": 80,
            "n_heads": 64,
            "n_kv_heads": 8,
            "vocab_size": 32000,
            "ffn_hidden_dim": 28672,
        },
        68_976_648_192,
    ),
    (  # Llama 3 8B
        {
            "dim": 4096,
            "n_layers": 32,
            "n_heads": 32,
            "n_kv_heads": 8,
            "vocab_size": 128256,
            "ffn_hidden_dim": 14336,
        },
        8_030_261_248,
    ),
    (  # Llama 3.2 1B: tied
        {
            "dim": 2048,
            "n_layers": 16,
            "n_heads": 32,
            "n_kv_heads": 8,
            "vocab_size": 128256,
            "ffn_hidden_dim": 8192,
            "tie_embeddings": True,
        },
        1_235_814_400,
    ),
]


@pytest.mark.parametrize(("shape", "count"), PUBLISHED)
def test_model_config_parameter_counts_as_published(shape: dict[str, int], count: int) -> None:
    assert ModelConfig(**shape).num_parameters == count  # type: ignore[arg-type]


def test_model_config_derived_sizes_match() -> None:
    model = ModelConfig(dim=96, n_heads=4)
    assert (model.kv_heads, model.resolved_head_dim, model.ffn_dim) == (4, 24, 256)
    model = ModelConfig(dim=96, n_heads=4, n_kv_heads=2, head_dim=32, ffn_hidden_dim=100)
    assert (model.kv_heads, model.resolved_head_dim, model.ffn_dim) == (2, 32, 100)
    assert ModelConfig(dim=4096, n_heads=32).ffn_dim == 11008


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (SchedulerConfig(warmup_steps=10), 90),
        (SchedulerConfig(name="linear", decay_steps=30), 30),
        (SchedulerConfig(name="wsd", warmup_steps=10), 10),
        (SchedulerConfig(name="constant"), 0),
    ],
)
def test_scheduler_config_decay_steps_derived(scheduler: SchedulerConfig, steps: int) -> None:
    assert scheduler.resolved_decay_steps(100) == steps


def test_run_config_folder_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RunConfig(name="a").folder == Path("runs/a")
    assert RunConfig(dir="~/x").folder == Path.home() / "x"
    run = RunConfig(dir="/scratch/{job_id}-{array_task_id}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(
        ConfigError, match=r"\{array_task_id\} cannot be expanded: SLURM_ARRAY_TASK_ID is not set"
    ):
        _ = run.folder
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert run.folder == Path("/scratch/17-3")


def test_data_config_cache_folder_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert DataConfig().cache_folder == Path("/fast/kempnerforge")
    assert DataConfig(cache_dir="~/c").cache_folder == Path.home() / "c"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert DataConfig().cache_folder == Path.home() / ".cache/kempnerforge"
