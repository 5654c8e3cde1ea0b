"""``JobConfig``: all sections of a training run, validated together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from kempnerforge.config.checkpoint import CheckpointConfig
from kempnerforge.config.data import DataConfig
from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.evaluation import EvalConfig
from kempnerforge.config.field_docs import item_section, nested_section, value_in_words
from kempnerforge.config.hooks import HookConfig
from kempnerforge.config.metrics import MetricsConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.optimizer import OptimizerConfig
from kempnerforge.config.parallel_dims import ParallelDims, derive_geometry
from kempnerforge.config.rules import check_rules
from kempnerforge.config.run import RunConfig
from kempnerforge.config.scheduler import SchedulerConfig
from kempnerforge.config.section import Section
from kempnerforge.config.suggestions import unknown_section_issues
from kempnerforge.config.toml_text import flatten, render
from kempnerforge.config.train import TrainConfig
from kempnerforge.config.validation_errors import section_faults
from kempnerforge.errors import ConfigError, ConfigIssue


class JobConfig(Section):
    """The configuration of a training run. Raises ConfigError if sections contradict each other."""

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
    hooks: list[HookConfig] = []  # noqa: RUF012 - pydantic copies it
    """Hooks, in the order in which they are called."""

    @model_validator(mode="after")
    def _sections_agree(self) -> JobConfig:
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        if faults := check_rules({**sections, "world_size": None, "environ": None}):
            raise ConfigError(faults)
        return self

    def geometry(self, world_size: int) -> ParallelDims:
        """Return the parallel layout on ``world_size`` processes.

        Raises:
            ConfigError: the processes do not fit the layout, or the global batch does not divide
                over it.
        """
        geometry, faults = derive_geometry(self.distributed, self.train, world_size)
        if geometry is None:
            raise ConfigError(faults)
        return geometry

    def with_global_batch_size(self, sequences: int) -> JobConfig:
        """Return this job with ``train.global_batch_size`` set, validated again.

        Raises:
            ConfigError: that many sequences do not divide over the layout.
        """
        return self._with_train(global_batch_size=sequences)

    def with_max_steps(self, steps: int) -> JobConfig:
        """Return this job with ``train.max_steps`` set, validated again.

        Raises:
            ConfigError: other keys do not fit that many steps.
        """
        return self._with_train(max_steps=steps)

    def _with_train(self, **keys: Any) -> JobConfig:
        # Without the defaults, so that it remains known which keys are set.
        tree = self.model_dump(mode="json", exclude_unset=True)
        tree["train"] = tree.get("train", {}) | keys
        job, faults = validate_tree(tree)
        if job is None:
            raise ConfigError(faults)
        return job

    def to_toml(self) -> str:
        """Return the resolved configuration as TOML, without the keys that are None.

        ``load_job`` reads it back as an equal job.
        """
        return render(self.model_dump(mode="json"))

    def flat(self) -> dict[str, Any]:
        """Return dotted key -> value of plain JSON types, in the order of the sections."""
        return flatten(self.model_dump(mode="json"))


def _validate_items(name: str, field: FieldInfo, tables: Any) -> tuple[list[Section], list[ConfigIssue]]:
    """Return the sections of the list of tables ``name``, and the issues of all of them."""
    section = item_section(field)
    assert section is not None
    if not isinstance(tables, list):
        return [], [ConfigIssue(name, "is not a list of tables", f"write [[{name}]] and its keys below it")]
    items: list[Section] = []
    faults: list[ConfigIssue] = []
    for index, table in enumerate(tables):
        try:
            items.append(section.model_validate(table))
        except ValidationError as error:
            faults += section_faults(error, f"{name}[{index}]", table, section, JobConfig)
    return items, faults


def validate_tree(
    tree: Mapping[str, Any],
    *,
    world_size: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[JobConfig | None, list[ConfigIssue]]:
    """Return the job that ``tree`` (section -> key -> value) describes, or all its issues.

    None for ``world_size`` or ``environ`` skips the checks that need it.
    """
    faults = [
        issue
        for name, table in tree.items()
        if name not in JobConfig.model_fields
        for issue in unknown_section_issues(name, table, JobConfig)
    ]
    sections: dict[str, Any] = {}
    for name, field in JobConfig.model_fields.items():
        section, table = nested_section(field), tree.get(name, {})
        if section is None:
            sections[name], item_faults = _validate_items(name, field, tree.get(name, []))
            faults += item_faults
            continue
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
