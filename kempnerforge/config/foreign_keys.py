"""What to write instead of keys that other training programs have.

The keys are those of torchtitan (``torchtitan/config/job_config.py``, also of early versions), of the
KempnerForge at github.com/KempnerInstitute/KempnerForge, and of the ``Trainer`` of transformers. They
are consulted only for keys that this program does not have.
"""

from __future__ import annotations

_ACCUMULATION = (
    "leave it out: gradients are accumulated until train.global_batch_size is reached, over "
    "train.batch_size sequences at a time"
)
_ALWAYS_SAVES = (
    "checkpoints are on by default; checkpoint.interval = 0 and checkpoint.save_last = false turn them off"
)
_EXPORT = "export weights afterwards, with kempnerforge ckpt export"
_NO_TENSORBOARD = "metrics are in metrics.jsonl, and in wandb with metrics.enable_wandb"
_LLAMA = "leave it out: [model] describes a Llama-style decoder, with RMSNorm and SwiGLU"
_PREFETCH = "leave it out: batches are read ahead on a thread (data.prefetch_batches)"
_PREPARE = "use data.text, or data.dataset_path with the output of kempnerforge data prepare"
_HOLDOUT = "use data.val_fraction: a part of the training data is held out"
_BETAS = "use optimizer.betas = [beta1, beta2]"
_NO_CONTEXT_PARALLELISM = "leave it out: there is no context parallelism"
_NO_EXPERTS = "leave it out: there are no expert layers"
_EPOCHS = "use train.max_steps; the start of a run says how many epochs that is"

KEYS = {
    "activation_checkpoint.mode": "use train.activation_checkpointing",
    "checkpoint.create_seed_checkpoint": "leave it out: initial weights are the same on every layout",
    "checkpoint.enable": _ALWAYS_SAVES,
    "checkpoint.enable_checkpoint": _ALWAYS_SAVES,
    "checkpoint.enable_first_step_checkpoint": "use checkpoint.at_steps = [1]",
    "checkpoint.folder": "use checkpoint.dir",
    "checkpoint.initial_load_model_only": "use checkpoint.exclude_from_loading",
    "checkpoint.initial_load_path": "use checkpoint.load_path",
    "checkpoint.keep_latest_k": "use checkpoint.keep_last_n",
    "checkpoint.last_save_in_hf": _EXPORT,
    "checkpoint.last_save_model_only": _EXPORT,
    "checkpoint.load_step": "go back with kempnerforge ckpt rollback RUN STEP",
    "comm.init_timeout_seconds": "use distributed.timeout_s",
    "comm.train_timeout_seconds": "use distributed.timeout_s",
    "compile.enable": "use train.compile_model",
    "data.file_pattern": "use data.dataset_path",
    "data.hf_dataset_name": _PREPARE,
    "data.pin_memory": _PREFETCH,
    "data.prefetch_factor": _PREFETCH,
    "data.tokenizer_path": "use data.tokenizer",
    "debug.deterministic": "use train.deterministic",
    "debug.seed": "use train.seed",
    "distributed.backend": "leave it out: NCCL on GPUs, gloo on CPUs",
    "distributed.cp": _NO_CONTEXT_PARALLELISM,
    "distributed.ep": _NO_EXPERTS,
    "distributed.nccl_timeout_sec": "use distributed.timeout_s",
    "eval.dataset_path": _HOLDOUT,
    "eval.enabled": "use eval.interval; 0 disables validation",
    "eval.hf_dataset_name": _HOLDOUT,
    "eval.steps": "use eval.num_batches",
    "experimental.custom_model_path": "use model.name",
    "job.description": "use run.name",
    "job.dump_folder": "use run.dir",
    "lr_scheduler.decay_ratio": 'use scheduler.decay_steps, with scheduler.name = "wsd"',
    "lr_scheduler.decay_type": "use scheduler.name",
    "lr_scheduler.lr_min": "use scheduler.min_lr_ratio",
    "lr_scheduler.min_lr_factor": "use scheduler.min_lr_ratio",
    "lr_scheduler.warmup_steps": "use scheduler.warmup_steps",
    "metrics.enable_tensorboard": _NO_TENSORBOARD,
    "metrics.log_freq": "use metrics.log_interval",
    "metrics.save_tb_folder": _NO_TENSORBOARD,
    "metrics.tensorboard_dir": _NO_TENSORBOARD,
    "model.activation": _LLAMA,
    "model.ffn_dim_multiplier": "use model.ffn_hidden_dim",
    "model.flavor": "write the shape into [model], as configs/llama_8b.toml does",
    "model.hf_assets_path": "use data.tokenizer",
    "model.norm_type": _LLAMA,
    "model.tokenizer_path": "use data.tokenizer",
    "model.type": "use model.name",
    "optimizer.beta1": _BETAS,
    "optimizer.beta2": _BETAS,
    "optimizer.implementation": "use optimizer.fused",
    "parallelism.context_parallel_degree": _NO_CONTEXT_PARALLELISM,
    "parallelism.data_parallel_replicate_degree": "use distributed.dp_replicate",
    "parallelism.data_parallel_shard_degree": "use distributed.dp_shard",
    "parallelism.expert_parallel_degree": _NO_EXPERTS,
    "parallelism.pipeline_parallel_degree": "use distributed.pp",
    "parallelism.pipeline_parallel_layers_per_stage": "use distributed.pp_layers",
    "parallelism.pipeline_parallel_microbatch_size": "use distributed.pp_microbatch_size",
    "parallelism.pipeline_parallel_schedule": "use distributed.pp_schedule",
    "parallelism.tensor_parallel_degree": "use distributed.tp",
    "scheduler.stable_steps": "leave it out: all steps between the warmup and scheduler.decay_steps",
    "train.shutdown_timeout_sec": "use train.shutdown_timeout_s",
    "training.batch_size": "use train.batch_size",
    "training.compile": "use train.compile_model",
    "training.data_parallel_degree": "use distributed.dp_shard",
    "training.data_parallel_replicate_degree": "use distributed.dp_replicate",
    "training.data_parallel_shard_degree": "use distributed.dp_shard",
    "training.dataset": _PREPARE,
    "training.dataset_path": "use data.dataset_path",
    "training.deterministic": "use train.deterministic",
    "training.global_batch_size": "use train.global_batch_size",
    "training.local_batch_size": "use train.batch_size",
    "training.max_norm": "use train.grad_clip_norm",
    "training.mixed_precision_param": "use train.mixed_precision",
    "training.mixed_precision_reduce": "leave it out: gradients are reduced in fp32",
    "training.seed": "use train.seed",
    "training.seq_len": "use train.seq_len",
    "training.steps": "use train.max_steps",
    "training.tensor_parallel_degree": "use distributed.tp",
    "validation.enable": "use eval.interval; 0 disables validation",
    "validation.enabled": "use eval.interval; 0 disables validation",
    "validation.freq": "use eval.interval",
    "validation.steps": "use eval.num_batches",
}
"""Dotted key -> what to write instead."""

LAST_PARTS = {
    "epochs": _EPOCHS,
    "eval_steps": "use eval.interval",
    "grad_accum_steps": _ACCUMULATION,
    "gradient_accumulation_steps": _ACCUMULATION,
    "learning_rate": "use optimizer.lr",
    "logging_steps": "use metrics.log_interval",
    "lr_scheduler_type": "use scheduler.name",
    "max_grad_norm": "use train.grad_clip_norm",
    "num_epochs": _EPOCHS,
    "num_train_epochs": _EPOCHS,
    "per_device_train_batch_size": "use train.batch_size",
    "save_steps": "use checkpoint.interval",
    "save_total_limit": "use checkpoint.keep_last_n",
}
"""Name of a key in any table, or in none -> what to write instead."""

SECTIONS = {
    "activation_checkpoint": "use train.activation_checkpointing",
    "compile": "use train.compile_model",
    "comm": "use distributed.timeout_s",
    "debug": "its keys are in [train]",
    "float8": "there is no FP8 training",
    "job": "use [run]",
    "logging": "use [metrics]",
    "lr_scheduler": "use [scheduler]",
    "mx": "there is no FP8 training",
    "parallelism": "use [distributed]",
    "training": "use [train]",
    "validation": "use [eval]",
}
"""Table -> what to write instead, for its keys that are not in ``KEYS``."""


VALUES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""Value in other programs -> the same value here."""


def what_to_write(key: str) -> str:
    """Return what to write instead of a key or table of another program; empty if it is not a known one."""
    table, _, last = key.rpartition(".")
    if known := KEYS.get(key) or LAST_PARTS.get(last):
        return known
    section = SECTIONS.get(key.partition(".")[0], "")
    return f"it may have no counterpart; {section}" if table and section else section
