"""The public names of the configuration."""

from __future__ import annotations

from kempnerforge.config.checkpoint import AsyncCheckpointMode, CheckpointConfig, DynCkptWindow
from kempnerforge.config.data import DataConfig, ValDataConfig
from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.evaluation import EvalConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.loading import LoadedJob, load_job
from kempnerforge.config.metrics import MetricsConfig
from kempnerforge.config.model import ModelConfig, RopeScalingConfig
from kempnerforge.config.optimizer import OptimizerConfig
from kempnerforge.config.parallel_dims import ParallelDims
from kempnerforge.config.run import RunConfig
from kempnerforge.config.scheduler import SchedulerConfig
from kempnerforge.config.section import Section
from kempnerforge.config.train import TrainConfig

Geometry = ParallelDims
"""Deprecated alias of ``ParallelDims``."""

__all__ = [
    "AsyncCheckpointMode",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "DynCkptWindow",
    "EvalConfig",
    "Geometry",
    "JobConfig",
    "LoadedJob",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelDims",
    "RopeScalingConfig",
    "RunConfig",
    "SchedulerConfig",
    "Section",
    "TrainConfig",
    "ValDataConfig",
    "load_job",
]
