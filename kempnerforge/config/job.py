"""``JobConfig``: all sections of a training run, checked together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, model_validator

from kempnerforge.config.checkpoint import CheckpointConfig
from kempnerforge.config.data import DataConfig
from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.evaluation import EvalConfig
from kempnerforge.config.field_docs import nested_section, value_in_words
from kempnerforge.config.metrics import MetricsConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.optimizer import OptimizerConfig
from kempnerforge.config.parallel_dims import ParallelDims, derive_geometry
from kempnerforge.config.rules import check_rules
from kempnerforge.config.run import RunConfig
from kempnerforge.config.scheduler import SchedulerConfig
from kempnerforge.config.section import Section
from kempnerforge.config.suggestions import suggest_key
from kempnerforge.config.toml_text import flatten, render
from kempnerforge.config.train import TrainConfig
from kempnerforge.config.validation_errors import section_faults
from kempnerforge.errors import ConfigError, ConfigIssue


class JobConfig(Section):
    """A training run. There is none whose sections contradict each other: making it raises ConfigError."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _sections_agree(self) -> JobConfig:
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        if faults := check_rules({**sections, "world_size": None, "environ": None}):
            raise ConfigError(faults)
        return self

    def geometry(self, world_size: int) -> ParallelDims:
        """The layout on ``world_size`` processes.

        Raises:
            ConfigError: they do not divide into it, or the global batch does not divide over it.
        """
        geometry, faults = derive_geometry(self.distributed, self.train, world_size)
        if geometry is None:
            raise ConfigError(faults)
        return geometry

    def with_global_batch_size(self, sequences: int) -> JobConfig:
        """This job with ``train.global_batch_size`` set, checked again.

        Raises:
            ConfigError: the layout cannot share out that many sequences.
        """
        tree = self.model_dump(mode="json")
        tree["train"]["global_batch_size"] = sequences
        job, faults = validate_tree(tree)
        if job is None:
            raise ConfigError(faults)
        return job

    def to_toml(self) -> str:
        """The resolved configuration; keys that are None are left out. ``load_job`` reads it back equal."""
        return render(self.model_dump(mode="json"))

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value of plain JSON types, in the order of the sections."""
        return flatten(self.model_dump(mode="json"))


def validate_tree(
    tree: Mapping[str, Any],
    *,
    world_size: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[JobConfig | None, list[ConfigIssue]]:
    """The job that ``tree`` (section -> key -> value) describes, or all its faults.

    ``world_size`` and ``environ`` are what is known about the start; None leaves their checks out.
    """
    faults = [
        ConfigIssue(name, "is not a known section", suggest_key(name, JobConfig))
        for name in tree
        if name not in JobConfig.model_fields
    ]
    sections: dict[str, Any] = {}
    for name, field in JobConfig.model_fields.items():
        section, table = nested_section(field), tree.get(name, {})
        assert section is not None
        if not isinstance(table, dict):
            hint = f"write [{name}] and its keys below it"
            faults.append(ConfigIssue(name, f"{value_in_words(table)} is not a table", hint))
            continue
        try:
            sections[name] = section.model_validate(table)
        except ValidationError as error:
            faults += section_faults(error, name, table, section, JobConfig)
    faults += check_rules({**sections, "world_size": world_size, "environ": environ})
    return (None, faults) if faults else (JobConfig(**sections), [])
