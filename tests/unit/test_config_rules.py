"""Rules that span keys and sections, the layout, and the batch."""

from __future__ import annotations

from typing import Any

import pytest

from kempnerforge.config import rules
from kempnerforge.config.model_changes import ModelChanges, model_changes
from kempnerforge.config.parallel_dims import derive_geometry
from kempnerforge.config.schedule_changes import learning_rate_change, when_continued
from kempnerforge.config.scheduler import SchedulerConfig
from kempnerforge.config.schema import (
    DistributedConfig,
    JobConfig,
    ModelConfig,
    ParallelDims,
    TrainConfig,
    load_job,
)
from kempnerforge.errors import ConfigError, ConfigIssue

TEXT = "--data.text=python-stdlib"


def faults(*overrides: str, world_size: int | None = None, inside_job: bool = True) -> list[ConfigIssue]:
    """The faults of the defaults under ``overrides``; none when they are valid."""
    text = [] if any(item.startswith("--data.text") for item in overrides) else [TEXT]
    try:
        load_job(None, [*text, *overrides], world_size=world_size, inside_job=inside_job)
    except ConfigError as error:
        return list(error.faults)
    return []


BROKEN = [
    # overrides, key, part of the problem, part of what is allowed
    (
        ["--model.n_heads=4", "--model.n_kv_heads=3"],
        "model.n_kv_heads",
        "3 does not divide n_heads 4",
        "1, 2, 4",
    ),
    (
        ["--model.n_heads=2", "--model.n_kv_heads=4"],
        "model.n_kv_heads",
        "4 does not divide n_heads 2",
        "1, 2",
    ),
    (["--model.dim=130"], "model.dim", "130 does not divide by n_heads 4", "128 or 132 would fit"),
    (["--model.dim=100"], "model.dim", "dim / n_heads is 25", "even"),
    (["--model.head_dim=33"], "model.head_dim", "head_dim is 33", "even"),
    (["--train.seq_len=4096"], "train.seq_len", "longer than model.max_seq_len 2048", "at most 2048"),
    (["--model.vocab_size=256"], "model.vocab_size", "256 is smaller", "at least 257"),
    (["--data.text=none"], "data.text", "none of", "python-stdlib"),
    (["--data.dataset_path=x"], "data.text", "text and dataset_path are set", "none"),
    (["--data.format=chat"], "data.tokenizer", '"bytes" has no chat template', "name the folder"),
    (
        ["--data.format=chat", "--data.text=none", "--data.dataset_path=x"],
        "data.format",
        '"chat" is a format of data.text, and data.dataset_path is set',
        "leave it out",
    ),
    (
        ["--data.prompt_field=q"],
        "data.prompt_field",
        'without data.format = "prompt_completion"',
        "leave it out",
    ),
    (["--data.chat_template=x"], "data.chat_template", 'without data.format = "chat"', "leave it out"),
    (
        ["--data.text=none", "--data.dataset=my:Set", "--data.packing=best_fit"],
        "data.packing",
        "samples of my:Set do not tell where documents end",
        "leave it out",
    ),
    (["--eval.interval=5", "--data.val_fraction=0"], "eval.interval", "val_fraction 0", "above 0"),
    (["--train.max_minutes=1"], "train.max_minutes", "not longer than deadline_margin_s", "lower"),
    (["--scheduler.warmup_steps=1001"], "scheduler.warmup_steps", "1001 is more than", "at most 1000"),
    (
        ["--scheduler.warmup_steps=600", "--scheduler.decay_steps=500"],
        "scheduler.decay_steps",
        "warmup 600 + decay 500",
        "at most 400",
    ),
    (
        ["--scheduler.name=wsd", "--scheduler.warmup_steps=950"],
        "scheduler.warmup_steps",
        "950 leaves too few of 1000 steps for the decay of 100",
        "at most 900",
    ),
    (
        ["--scheduler.name=constant", "--scheduler.decay_steps=5"],
        "scheduler.decay_steps",
        "no effect",
        "another schedule",
    ),
    (
        ["--checkpoint.interval=2000", "--checkpoint.save_last=false"],
        "checkpoint.interval",
        "2000 is more than train.max_steps 1000",
        "at most 1000",
    ),
    (
        ["--checkpoint.interval=auto", "--checkpoint.keep_steps=[500]"],
        "checkpoint.keep_steps",
        "no setting saves 500",
        "at_steps",
    ),
    (
        ["--checkpoint.expected_mtti_hours=3"],
        "checkpoint.expected_mtti_hours",
        'no effect unless checkpoint.interval is "auto"',
        "leave it out",
    ),
    (
        ["--checkpoint.interval=0", "--checkpoint.max_overhead_pct=2"],
        "checkpoint.max_overhead_pct",
        "interval is 0 and interval_minutes is not set",
        "set one of them",
    ),
    (
        ["--checkpoint.exclude_from_loading=['rng']"],
        "checkpoint.exclude_from_loading",
        "without checkpoint.load_path",
        "load_path",
    ),
    (
        ["--checkpoint.interval=0", "--checkpoint.save_last=false", "--checkpoint.at_steps=[2000, 1001]"],
        "checkpoint.at_steps",
        "1001 is more than train.max_steps 1000",
        "no checkpoint would be written",
    ),
    (
        ["--checkpoint.dyn_ckpt_window.start=9", "--checkpoint.dyn_ckpt_window.stop=15"],
        "checkpoint.dyn_ckpt_window.stop",
        "no power of two lies between start 9 and stop 15",
        "16 or more",
    ),
    (
        ["--checkpoint.dyn_ckpt_window={start=8, stop=4}"],
        "checkpoint.dyn_ckpt_window.stop",
        "4: no power of two",
        "8 or more",
    ),
    (
        ["--checkpoint.keep_steps=[300, 350, 425]"],
        "checkpoint.keep_steps",
        "no setting saves 350, 425",
        "add 350, 425 to at_steps",
    ),
    (["--checkpoint.keep_steps=[0]"], "checkpoint.keep_steps", "saves 0", "save_first = true"),
    (
        ["--checkpoint.keep_best_n=2"],
        "checkpoint.keep_best_n",
        "2 needs a metric, and best_metric is not set",
        '"eval/loss"',
    ),
    (
        ["--checkpoint.best_metric=eval/loss"],
        "checkpoint.best_metric",
        "no effect without keep_best_n",
        "set keep_best_n",
    ),
    (["--checkpoint.best_mode=max"], "checkpoint.best_mode", '"max" has no effect', "set keep_best_n"),
    (
        ["--checkpoint.keep_best_n=2", "--checkpoint.best_metric=eval/los", "--eval.interval=10"],
        "checkpoint.best_metric",
        '"eval/los" is not a metric',
        'did you mean "eval/loss"?',
    ),
    (
        ["--checkpoint.keep_best_n=2", "--checkpoint.best_metric=eval/loss"],
        "checkpoint.best_metric",
        "never measured: eval.interval is 0",
        "set eval.interval",
    ),
    (["--checkpoint.dir=/x/{job_id}"], "checkpoint.dir", "{job_id} is not expanded here", "run.dir"),
    (["--run.dir=/x/{jobid}"], "run.dir", "{jobid} is not a known placeholder", "{job_id}"),
    (
        [
            "--model.rope_scaling={factor=8,low_freq_factor=4,high_freq_factor=4,"
            "original_max_position_embeddings=8192}"
        ],
        "model.rope_scaling.high_freq_factor",
        "4.0 is not above low_freq_factor 4.0",
        "",
    ),
    (
        ["--distributed.tp=2", "--train.seq_len=255"],
        "distributed.tp",
        "2 does not divide train.seq_len 255",
        "choose a divisor",
    ),
    (
        ["--distributed.pp=4", "--train.batch_size=3"],
        "train.batch_size",
        "3 makes 3 microbatches per rank; 1f1b with pp 4 needs at least 4",
        "batch_size 4 would fit",
    ),
    (
        ["--distributed.pp_schedule=gpipe"],
        "distributed.pp_schedule",
        "no effect without a pipeline",
        "pp > 1",
    ),
    (["--distributed.pp_microbatch_size=2"], "distributed.pp_microbatch_size", "no effect", "pp > 1"),
    (["--run.dir=s3://bucket/run"], "run.dir", '"s3://bucket/run" is a URL', "a path, not a URL"),
    (["--checkpoint.dir=gs://x"], "checkpoint.dir", "is a URL", "a path, not a URL"),
    (["--run.dir=a\nrm -rf b"], "run.dir", r"'a\nrm -rf b' has a control character", "without line breaks"),
    (["--checkpoint.dir=a\x1b[2J"], "checkpoint.dir", "has a control character", "without line breaks"),
    (["--checkpoint.load_path=https://x/y"], "checkpoint.load_path", "is a URL", "a path, not a URL"),
]


@pytest.mark.parametrize(("overrides", "key", "problem", "allowed"), BROKEN)
def test_rules_broken_rule_is_one_fault(overrides: list[str], key: str, problem: str, allowed: str) -> None:
    [fault] = faults(*overrides)
    assert fault.key == key
    assert problem in fault.problem
    assert allowed in fault.allowed


@pytest.mark.parametrize(
    "overrides",
    [
        ["--model.vocab_size=100", "--data.text=none", "--data.dataset_path=x"],
        ["--model.vocab_size=100", "--data.tokenizer=tokenizer.json"],
        ["--model.dim=130", "--model.head_dim=32"],
        ["--eval.interval=5", "--data.text=none", "--data.dataset_path=x", "--data.val_fraction=0"],
        ["--data.format=prompt_completion", "--data.completion_field=answer"],
        ["--data.format=chat", "--data.tokenizer=x", "--data.messages_field=talk", "--data.chat_template=y"],
        ["--scheduler.warmup_steps=1000"],
        ["--scheduler.name=constant", "--scheduler.warmup_steps=1000"],
        ["--checkpoint.interval=0", "--checkpoint.save_last=false"],
        ["--checkpoint.interval=2000"],
        ["--checkpoint.interval=auto", "--checkpoint.save_last=false", "--checkpoint.expected_mtti_hours=3"],
        ["--checkpoint.interval=auto", "--checkpoint.keep_steps=[500]", "--checkpoint.at_steps=[500]"],
        ["--checkpoint.interval=0", "--checkpoint.interval_minutes=5", "--checkpoint.max_overhead_pct=2"],
        ["--checkpoint.interval=2000", "--checkpoint.save_last=false", "--checkpoint.save_first=true"],
        ["--checkpoint.interval=2000", "--checkpoint.save_last=false", "--checkpoint.interval_minutes=5"],
        ["--checkpoint.interval=2000", "--checkpoint.save_last=false", "--checkpoint.at_steps=[7]"],
        ["--checkpoint.dyn_ckpt_window.stop=1"],
        ["--checkpoint.dyn_ckpt_window={start=8, stop=8}"],
        [
            "--checkpoint.keep_steps=[0, 7, 16, 300, 1000, 1234]",
            "--checkpoint.save_first=true",
            "--checkpoint.at_steps=[7]",
            "--checkpoint.dyn_ckpt_window.stop=16",
        ],
        ["--checkpoint.keep_best_n=2", "--checkpoint.best_metric=train/loss", "--checkpoint.best_mode=max"],
        ["--checkpoint.keep_best_n=2", "--checkpoint.best_metric=eval/loss", "--eval.interval=10"],
        ["--checkpoint.load_path=x", "--checkpoint.exclude_from_loading=['rng', 'data']"],
        ["--train.seq_len=2048"],
    ],
)
def test_rules_valid_overrides_no_fault(overrides: list[str]) -> None:
    assert faults(*overrides) == []


def test_rules_run_dir_placeholder_needed_inside_job_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    [fault] = faults("--run.dir=/x/{job_id}")
    assert (fault.key, "SLURM_JOB_ID is not set" in fault.problem) == ("run.dir", True)
    assert faults("--run.dir=/x/{job_id}", inside_job=False) == []
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert faults("--run.dir=/x/{job_id}") == []


BAD_LAYOUTS = [
    # overrides, processes, key, part of the problem, part of what would fit
    (["--distributed.dp_shard=4"], 2, "dp_shard", "= 4, but processes started: 2", "start 4 processes"),
    (["--distributed.dp_shard=4"], 2, "dp_shard", "= 4", "dp_shard = 2 or -1"),
    (
        ["--distributed.dp_replicate=3"],
        8,
        "dp_replicate",
        "3 does not divide the number of processes, 8",
        "multiple",
    ),
    (
        ["--distributed.dp_replicate=3", "--distributed.dp_shard=2"],
        8,
        "dp_replicate",
        "= 6, but processes started: 8",
        "start 6 processes",
    ),
]


@pytest.mark.parametrize(("overrides", "world_size", "key", "problem", "fits"), BAD_LAYOUTS)
def test_rules_processes_not_filling_layout_is_fault(
    overrides: list[str], world_size: int, key: str, problem: str, fits: str
) -> None:
    [fault] = faults(*overrides, world_size=world_size)
    assert fault.key == f"distributed.{key}"
    assert problem in fault.problem
    assert fits in fault.allowed


BAD_BATCHES = [
    (48, 5, 4, "48 does not divide by batch_size 5 x 4", "40 or 60", "batch_size 4, 6 or 12"),
    (20, 8, 2, "20 does not divide by batch_size 8 x 2", "16 or 32", "batch_size 2, 5 or 10"),
    (7, 4, 2, "= 8", "global_batch_size 8 would fit", None),
]


@pytest.mark.parametrize(("total", "per_rank", "ranks", "problem", "totals", "sizes"), BAD_BATCHES)
def test_rules_indivisible_batch_names_sizes_that_fit(
    total: int, per_rank: int, ranks: int, problem: str, totals: str, sizes: str | None
) -> None:
    overrides = [f"--train.global_batch_size={total}", f"--train.batch_size={per_rank}"]
    [fault] = faults(*overrides, world_size=ranks)
    assert fault.key == "train.global_batch_size"
    assert problem in fault.problem
    assert totals in fault.allowed
    named = fault.allowed.partition("batch_size ")[2].partition(" would fit")[0]
    for size in named.split(" or "):
        assert faults(f"--train.global_batch_size={size}", overrides[1], world_size=ranks) == []
    _, _, others = fault.allowed.partition("so would batch_size ")
    assert bool(others) == (sizes is not None)
    for size in others.replace(" or ", ", ").split(", ") if others else []:
        assert faults(overrides[0], f"--train.batch_size={size}", world_size=ranks) == []


def test_rules_batch_without_world_size_partly_checked() -> None:
    """Without a world size the batch is checked as far as it can be."""
    assert faults("--train.global_batch_size=12")[0].key == "train.global_batch_size"
    batch = ["--train.global_batch_size=24"]
    assert faults(*batch) == []
    assert faults(*batch, "--distributed.dp_replicate=2")[0].key == "train.global_batch_size"
    assert faults(*batch, "--distributed.dp_shard=2")[0].key == "train.global_batch_size"
    assert faults(*batch, "--distributed.dp_shard=3") == []


def test_geometry_known_layouts_derived() -> None:
    job = load_job(None, [TEXT, "--train.batch_size=4", "--distributed.dp_replicate=2"]).job
    assert job.geometry(8) == ParallelDims(
        dp_replicate=2, dp_shard=4, dp=8, tp=1, pp=1, global_batch_size=32, accumulation_steps=1
    )
    kept = job.with_global_batch_size(32)
    assert kept.train.global_batch_size == 32
    assert kept.geometry(2).accumulation_steps == 4
    assert kept.geometry(2).global_batch_size == 32
    assert job.train.global_batch_size is None
    with pytest.raises(ConfigError, match=r"train.global_batch_size: 32 does not divide by batch_size 4 x 6"):
        kept.geometry(6)
    with pytest.raises(ConfigError, match=r"distributed.dp_replicate"):
        job.geometry(3)
    with pytest.raises(ConfigError, match=r"train.global_batch_size: 31 does not divide"):
        job.with_global_batch_size(31)


def test_rules_document_mask_of_own_dataset_refused() -> None:
    own = ["--data.text=none", "--data.dataset=my_data:Rows"]
    assert faults(*own) == []
    [fault] = faults(*own, "--data.document_mask=true")
    assert fault.key == "data.document_mask"
    assert fault.problem == "samples of my_data:Rows do not tell where documents end"


def test_job_config_contradiction_refused() -> None:
    with pytest.raises(ConfigError, match="none of text, dataset_path, dataset and sources"):
        JobConfig()


PIPELINE = DistributedConfig(pp=4)
INTERLEAVED = DistributedConfig(pp=4, pp_schedule="interleaved_1f1b")


@pytest.mark.parametrize(
    ("distributed", "model", "train", "keys"),
    [
        (PIPELINE, ModelConfig(n_layers=4), TrainConfig(), []),
        (PIPELINE, ModelConfig(n_layers=3), TrainConfig(), ["distributed.pp"]),
        (INTERLEAVED, ModelConfig(n_layers=8), TrainConfig(), []),
        (INTERLEAVED, ModelConfig(n_layers=7), TrainConfig(), ["distributed.pp"]),
        (PIPELINE, ModelConfig(tie_embeddings=True), TrainConfig(), ["model.tie_embeddings"]),
        (
            DistributedConfig(pp=2, pp_microbatch_size=3),
            ModelConfig(),
            TrainConfig(batch_size=8),
            ["distributed.pp_microbatch_size"],
        ),
        (DistributedConfig(pp=2, pp_microbatch_size=4), ModelConfig(), TrainConfig(batch_size=8), []),
        (DistributedConfig(pp=2, pp_layers=[1, 3]), ModelConfig(n_layers=4), TrainConfig(), []),
        (
            DistributedConfig(pp=2, pp_layers=[1, 2]),
            ModelConfig(n_layers=4),
            TrainConfig(),
            ["distributed.pp_layers"],
        ),
        (DistributedConfig(pp_layers=[4]), ModelConfig(n_layers=4), TrainConfig(), ["distributed.pp_layers"]),
    ],
)
def test_rules_pipeline_table_matches(
    distributed: DistributedConfig, model: ModelConfig, train: TrainConfig, keys: list[str]
) -> None:
    assert [fault.key for fault in rules.pipeline_fits(distributed, model, train)] == keys


@pytest.mark.parametrize(
    ("schedule", "pp", "batch", "dp", "fits"),
    [
        ("1f1b", 4, {"batch_size": 4}, 1, None),
        ("1f1b", 4, {"batch_size": 2}, 1, "batch_size 4 would fit"),
        ("1f1b", 4, {"batch_size": 1, "global_batch_size": 8}, 2, None),
        ("1f1b", 4, {"batch_size": 1, "global_batch_size": 4}, 2, "global_batch_size 8 would fit"),
        ("1f1b", 3, {"batch_size": 2, "global_batch_size": 4}, 2, "global_batch_size 8 would fit"),
        ("gpipe", 4, {"batch_size": 1}, 1, None),
        ("interleaved_1f1b", 2, {"batch_size": 1}, 1, None),
        ("interleaved_1f1b", 2, {"batch_size": 8}, 1, None),
        ("interleaved_1f1b", 2, {"batch_size": 5}, 1, "batch_size 4 or 6 would fit"),
        ("interleaved_1f1b", 4, {"batch_size": 10}, 1, None),
        ("interleaved_1f1b", 2, {"batch_size": 1, "global_batch_size": 14}, 2, "12 or 16 would fit"),
    ],
)
def test_geometry_microbatches_fit_schedule(
    schedule: str, pp: int, batch: dict[str, int], dp: int, fits: str | None
) -> None:
    distributed = DistributedConfig.model_validate({"pp": pp, "pp_schedule": schedule, "dp_shard": dp})
    geometry, faults = derive_geometry(distributed, TrainConfig.model_validate(batch), pp * dp)
    assert (geometry is None) == (fits is not None)
    for fault in faults:
        assert fits is not None
        assert fits in fault.allowed


@pytest.mark.parametrize(
    ("tp", "model", "problems"),
    [
        (2, ModelConfig(n_heads=4, n_kv_heads=2), []),
        (4, ModelConfig(n_heads=4, n_kv_heads=2), ["4 does not divide model.n_kv_heads 2"]),
        (
            3,
            ModelConfig(n_heads=4),
            [
                "3 does not divide model.n_heads 4",
                "3 does not divide model.n_kv_heads 4",
            ],
        ),
        (2, ModelConfig(ffn_hidden_dim=33), ["2 does not divide model.ffn_hidden_dim 33"]),
        (8, ModelConfig(n_heads=8), ["8 does not divide train.seq_len 36"]),
        (4, ModelConfig(vocab_size=6), ["4 ranks cannot each have some of model.vocab_size 6"]),
        (4, ModelConfig(vocab_size=7), []),
    ],
)
def test_rules_tensor_parallel_table_matches(tp: int, model: ModelConfig, problems: list[str]) -> None:
    faults = rules.tensor_parallel_fits(DistributedConfig(tp=tp), model, TrainConfig(seq_len=36))
    found = [fault.problem for fault in faults]
    assert len(found) == len(problems)
    for problem, start in zip(found, problems, strict=True):
        assert problem.startswith(start)


def test_rules_parameters_are_known_names() -> None:
    """A misspelled parameter would switch a rule off without a word."""
    from inspect import signature

    known = {*JobConfig.model_fields, "world_size", "environ"}
    for rule in rules.RULES:
        assert set(signature(rule).parameters) <= known, rule.__name__


BASE = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 300}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("now", "lines", "same_shapes"),
    [
        ({}, [], True),
        ({"n_kv_heads": 4, "head_dim": 16, "rope_theta": 10000.0}, [], True),
        ({"max_seq_len": 64, "init_std": 0.1}, [], True),
        ({"n_heads": 8}, ["n_heads was 4, is 8", "n_kv_heads was 4, is 8", "head_dim was 16, is 8"], True),
        ({"n_kv_heads": 2}, ["n_kv_heads was 4, is 2"], False),
        ({"dim": 128, "head_dim": 16}, ["dim was 64, is 128", "ffn_hidden_dim was 256, is 512"], False),
        ({"rope_theta": 5e5}, ["rope_theta was 10000.0, is 500000.0"], True),
        ({"norm_eps": 1e-6}, ["norm_eps was 1e-05, is 1e-06"], True),
        ({"tie_embeddings": True}, ["tie_embeddings was false, is true"], False),
        (
            {"rope_scaling": SCALING},
            [
                "rope_scaling was none, is {factor = 8.0, low_freq_factor = 1.0, high_freq_factor = 4.0, "
                "original_max_position_embeddings = 8192}"
            ],
            True,
        ),
    ],
)
def test_model_changes_compare_what_keys_mean(
    now: dict[str, Any], lines: list[str], same_shapes: bool
) -> None:
    found = model_changes(BASE | {"key_of_another_version": 1}, BASE | now)
    assert list(found.lines) == [f"model.{line}" for line in lines]
    assert found.same_shapes is same_shapes


def test_model_changes_unreadable_table_not_compared() -> None:
    assert model_changes(BASE | {"dim": "wide"}, BASE) == ModelChanges()


COSINE = {"optimizer": {"lr": 1e-3}, "scheduler": {"warmup_steps": 100}, "train": {"max_steps": 1000}}


@pytest.mark.parametrize(
    ("now", "step", "before", "after", "to_keep"),
    [
        ({"train": {"max_steps": 2000}}, 1000, 1e-4, 5.87e-4, "scheduler.decay_steps = 900"),
        ({"train": {"max_steps": 2000}}, 550, 5.5e-4, 8.85e-4, "scheduler.decay_steps = 900"),
        ({"optimizer": {"lr": 2e-3}}, 1000, 1e-4, 2e-4, ""),
        ({"scheduler": {"warmup_steps": 100, "name": "constant"}}, 1000, 1e-4, 1e-3, ""),
        ({"train": {"max_steps": 2000}}, 50, None, None, ""),  # both are in the warmup
        ({"train": {"max_steps": 1000, "global_batch_size": 8}}, 1000, None, None, ""),
    ],
)
def test_learning_rate_change_table_matches(
    now: dict[str, Any], step: int, before: float | None, after: float | None, to_keep: str
) -> None:
    found = learning_rate_change(COSINE, COSINE | now, step)
    if before is None:
        assert found is None
    else:
        assert found is not None
        assert [found.before, found.now] == pytest.approx([before, after], rel=0.02)
        assert found.to_keep == to_keep


def test_learning_rate_change_unreadable_not_compared() -> None:
    assert learning_rate_change(COSINE | {"scheduler": {"name": "unknown"}}, COSINE, 5) is None


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (
            {"warmup_steps": 100},
            "the learning rate then changes from 0.0001 to 0.000587; "
            "add --scheduler.decay_steps=900 to keep it",
        ),
        ({"warmup_steps": 100, "decay_steps": 900}, ""),
        ({"name": "constant"}, ""),
        ({"name": "wsd"}, "from 0.0001 to 0.001, because the decay is at the end of the run"),
    ],
)
def test_schedule_continued_run_change_is_said(scheduler: dict[str, Any], expected: str) -> None:
    config = SchedulerConfig.model_validate(scheduler)
    said = when_continued(config, base_lr=1e-3, max_steps=1000, until=2000)
    assert expected in said
    assert bool(said) is bool(expected)
