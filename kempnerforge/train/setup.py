"""Build everything that the training loop needs from a config."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.run.attempt_start import OpenOptions, open_run
from kempnerforge.checkpoint.run.lease import Lease
from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.checkpoint.run.versions import versions
from kempnerforge.checkpoint.state import rng_state
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.path_text import expand
from kempnerforge.config.plugin_uses import check_plugins, plugin_versions
from kempnerforge.config.schema import AsyncCheckpointMode, JobConfig, ParallelDims
from kempnerforge.data.fingerprint import compare_data, fingerprint
from kempnerforge.data.loader import AnySamples, BatchLoader, Cursor, batch_ids, order_of
from kempnerforge.data.map_dataset import MapDataset, MapSamples
from kempnerforge.data.mixture import MixtureDataset
from kempnerforge.data.tokenizer import TOKENIZER, tokenizer_path
from kempnerforge.data.tokens import Samples
from kempnerforge.distributed.context import DistributedContext, collectives_issued
from kempnerforge.errors import ConfigError, KempnerForgeError, LeaseLostError, StopRequestedError
from kempnerforge.goodput.run_history import RunHistory
from kempnerforge.telemetry.console import ConsoleSink
from kempnerforge.telemetry.flops import peak_bf16_flops
from kempnerforge.telemetry.memory import PeakMemory
from kempnerforge.train.attempt_recorder import AttemptRecorder
from kempnerforge.train.cpu_limits import check_cpu
from kempnerforge.train.data_setup import AnyDataset, open_data, val_splits
from kempnerforge.train.hangs.progress import Progress
from kempnerforge.train.hooks import HookSet, load_hooks
from kempnerforge.train.metric_loggers import Reports, build_reports
from kempnerforge.train.mixture_run import describe_mixture, end_with_data, epochs_at
from kempnerforge.train.model_setup import ParallelModel, build_model
from kempnerforge.train.optimizer import Optimizers, ParameterGroup, build_optimizer, each, hyperparameters_of
from kempnerforge.train.out_of_memory import MemoryHolders
from kempnerforge.train.own_model import check_own_model
from kempnerforge.train.preflight import check_files
from kempnerforge.train.profile_request import Profiler
from kempnerforge.train.run_dir import record_refusal
from kempnerforge.train.run_facts import run_facts
from kempnerforge.train.run_length import run_length
from kempnerforge.train.step import TrainStep
from kempnerforge.train.step_consensus import Control
from kempnerforge.train.termination.signals import StopSignals
from kempnerforge.train.termination.stop_conditions import StopConditions

log = logging.getLogger(__name__)


@dataclass
class Run:
    """One attempt of a run, ready for the loop."""

    job: JobConfig
    """The config, with the ``train.max_steps`` that the data are enough for."""
    full_job: JobConfig
    """The config as it was given."""
    used_up: str
    """The source that is used up at ``train.max_steps`` of ``job``; empty if that is the config's."""
    world: DistributedContext
    geometry: ParallelDims
    folder: Path
    model: tuple[nn.Module, ...]
    """This rank's parts of the model."""
    state: TrainState
    step: TrainStep
    ckpt: CheckpointManager
    control: Control
    train_samples: AnySamples
    val_samples: Mapping[str, Samples | MapSamples]
    """By the name of the source; "" without a mixture. Empty if the run does not validate."""
    reports: Reports
    recorder: AttemptRecorder
    progress: Progress
    peak_memory: PeakMemory
    memory_holders: MemoryHolders
    num_parameters: int
    flops_per_token: float | None
    peak_flops: float | None
    has_weights: bool
    """Whether weights were initialized. They are not when the run has a committed step to load."""
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, validation loss) of this attempt, in order."""

    def end_with_data(self) -> None:
        """Set the last step anew, if the cursor of the state is not that of its step, as in a warm start."""
        size, cursor = self.geometry.global_batch_size, Cursor(**self.state.cursor)
        if cursor.samples != self.state.step * size:
            self.job, self.used_up = end_with_data(
                self.full_job, self.train_samples, size, step=self.state.step, cursor=cursor.samples
            )
            if self.used_up:
                log.info(
                    f'the run ends at step {self.job.train.max_steps}: source "{self.used_up}" is used up'
                )

    def batches(self) -> BatchLoader:
        """Return a loader of the data from the state's cursor on."""
        train = self.job.train
        return BatchLoader(
            self.train_samples,
            seed=train.seed,
            global_batch_size=self.geometry.global_batch_size,
            batch_size=train.batch_size,
            dp_rank=self.geometry.dp_rank(self.world.rank),
            dp_size=self.geometry.dp,
            cursor=Cursor(**self.state.cursor),
            prefetch_batches=self.job.data.prefetch_batches,
            num_workers=self.job.data.num_workers,
        )


def build(
    job: JobConfig,
    world: DistributedContext,
    stopping: StopConditions,
    recorder: AttemptRecorder,
    console: ConsoleSink | None,
) -> Run:
    """Open the run's folder, the data, the model and the sinks.

    ``console`` shows rows, on rank 0. The state is that of step 0. Weights are not initialized if a
    step will be loaded.

    Collective: all ranks. Raises ConfigError, DataError, RunFolderError and StopRequestedError on
    all ranks.
    """
    _check_plugins(job, world)
    world.control.run_on_rank0(lambda: _check_files(job, stopping.signals))
    check_cpu(job, world)
    first_geometry = job.geometry(world.num_ranks) if job.train.global_batch_size is None else None
    first_size = first_geometry.global_batch_size if first_geometry else job.train.global_batch_size
    assert first_size is not None
    folder = job.run.folder
    history = RunHistory(folder)
    record, lease = open_run(
        folder,
        world.control,
        first_global_batch_size=first_size,
        checkpoint_dir=job.checkpoint.dir,
        run_name=job.run.name,
        options=OpenOptions(history=history),
    )
    if job.train.global_batch_size is None:
        job = job.with_global_batch_size(record.global_batch_size)
    try:
        layout = _layout(job.geometry(world.num_ranks), world)
        facts = partial(run_facts, job, world.device)
        has_steps = recorder.open(job, record, world, layout, history, facts=facts)
        recorder.end_phase("folder")
        stopping.open(job, record.attempt, history, is_first=world.rank == 0)
        stopping.raise_if_stop_requested(world.control)
        return _assemble(job, world, stopping, record, lease, recorder, console, init_weights=not has_steps)
    except BaseException as error:
        # When another attempt has taken over the run, run.json belongs to that attempt.
        is_mine = lease is not None and not isinstance(error, LeaseLostError)
        if is_mine and isinstance(error, KempnerForgeError):
            record_refusal(record.checkpoint_folder(folder), folder, error)
        # Otherwise the next start, possibly on another host, would have to watch this lease.
        if lease is not None:
            lease.release()
        raise


def _check_plugins(job: JobConfig, world: DistributedContext) -> None:
    """Import the plug-ins on every rank, and check a model of the user's on rank 0. Collective: all ranks."""
    error: ConfigError | None = None
    try:
        check_plugins(job)
    except ConfigError as raised:
        error = raised
    world.control.raise_on_any_error(error)
    if not job.model.is_llama:
        world.control.run_on_rank0(lambda: check_own_model(job))


def _check_files(job: JobConfig, signals: StopSignals) -> None:
    """Check the files of the config, or return early at a stop request.

    The ranks agree on the stop later, once ``run.json`` exists.
    """
    with contextlib.suppress(StopRequestedError):
        signals.interruptible(lambda: check_files(job))


def _assemble(
    job: JobConfig,
    world: DistributedContext,
    stopping: StopConditions,
    record: RunRecord,
    lease: Lease | None,
    recorder: AttemptRecorder,
    console: ConsoleSink | None,
    *,
    init_weights: bool,
) -> Run:
    geometry, folder, history = job.geometry(world.num_ranks), job.run.folder, recorder.history
    reports = build_reports(job, console, device=world.device, folder=folder, record=record, history=history)
    hooks = load_hooks(job, world)
    dataset = open_data(job, world, stopping.signals)
    stopping.raise_if_stop_requested(world.control)
    train_samples = dataset.split("train", job.train.seq_len)
    full_job = job
    job, used_up = end_with_data(job, train_samples, geometry.global_batch_size)
    if console is not None:
        console.max_steps = job.train.max_steps
    recorder.end_phase("data")
    options: dict[str, Any] = {"rank": world.rank, "device": world.device, "control": world.control}
    model = build_model(job, geometry, init_weights=init_weights, has_tokens=dataset.has_tokens, **options)
    optimizer = build_optimizer(model.parts, job.optimizer, world.device, model.groups)
    state = _build_state(job, world, geometry, model, optimizer, dataset)
    recorder.end_phase("model")
    ckpt = CheckpointManager(
        # The placeholders of the path were filled in when the attempt started.
        job.checkpoint.model_copy(update={"dir": record.checkpoint_dir or None}),
        state=state,
        run_dir=folder,
        control_group=world.control.group,
        context=_context(job, world, geometry, record, dataset, history),
        lease=lease,
        requests=stopping.requests,
    )
    log.info(
        f"run {job.run.name}, attempt {record.attempt}: {model.num_parameters / 1e6:.1f}M parameters on "
        f"{world.num_ranks} x {world.device.type}, {geometry.global_batch_size} sequences per step "
        f"({_describe_batches(job, geometry)}), in {folder}"
    )
    _log_length(job, train_samples, geometry.global_batch_size, used_up)
    if job.checkpoint.async_mode is AsyncCheckpointMode.async_pinned and world.device.type != "cuda":
        log.info("checkpoint: without CUDA, async_with_pinned_mem copies to pageable memory on a thread")
    progress = Progress(collectives_issued)
    return Run(
        job=job,
        world=world,
        geometry=geometry,
        folder=folder,
        model=tuple(model.parts),
        state=state,
        step=model.step(optimizer, geometry, job.train, num_sources=len(job.data.sources)),
        ckpt=ckpt,
        control=_control(job, world, hooks, stopping, ckpt, recorder, progress),
        train_samples=train_samples,
        val_samples=val_splits(job, dataset) if job.eval.interval else {},
        reports=reports,
        recorder=recorder,
        progress=progress,
        peak_memory=PeakMemory(world.device),
        memory_holders=MemoryHolders(model.parts, list(each(optimizer))),
        num_parameters=model.num_parameters,
        flops_per_token=model.flops_per_token(job.train.seq_len),
        peak_flops=_peak_flops(world.device),
        has_weights=init_weights,
        full_job=full_job,
        used_up=used_up,
    )


def _control(
    job: JobConfig,
    world: DistributedContext,
    hooks: Mapping[int, Any],
    stopping: StopConditions,
    ckpt: CheckpointManager,
    recorder: AttemptRecorder,
    progress: Progress,
) -> Control:
    """Return the agreement after a step, with the hooks and the profiler, which take part in it."""
    hook_set = HookSet(
        job,
        world,
        hooks,
        begin=lambda step: progress.begin("hooks", step),
        spent=ckpt.exclude_time,
        record=recorder.fault,
    )
    profiler = Profiler(job.run.folder, world.control, stopping.requests, spent=ckpt.exclude_time)
    return Control(world.control, ckpt, stopping, hook_set, profiler)


def _build_state(
    job: JobConfig,
    world: DistributedContext,
    geometry: ParallelDims,
    model: ParallelModel,
    optimizer: Optimizers,
    dataset: AnyDataset,
) -> TrainState:
    seed = job.train.seed
    order = order_of(dataset.split("train", job.train.seq_len), seed)

    def batch_digest(cursor: Mapping[str, Any]) -> str:
        return order.digest(batch_ids(Cursor(**cursor), order, geometry.global_batch_size))

    # A resume restores the saved state, or derives it again for another layout.
    # Tensor-parallel ranks compute the same activations between matrices, so they draw the same
    # numbers. They are neighbours in the mesh.
    rng_stream = world.rank // geometry.tp
    rng_state.derive(seed, 0, rng_stream, world.device)
    if isinstance(optimizer, dict):
        log.info("optimizers: %s", _describe_optimizers(optimizer, model.groups))
    return TrainState(
        model=model.parts,
        groups={group.name: group.names for group in model.groups},
        optimizer=optimizer,
        hyperparameters=hyperparameters_of(optimizer),
        device=world.device,
        seed=seed,
        # On rank 0 only: the digest of .npy shards is computed from their bytes.
        fingerprint=world.control.run_on_rank0(
            lambda: fingerprint(dataset, "train", job.train.seq_len, seed)
        ),
        scheduler=job.scheduler.model_dump(mode="json"),
        cursor=Cursor(0),
        batch_digest=batch_digest,
        rng_stream=rng_stream,
    )


def _log_length(job: JobConfig, samples: AnySamples, size: int, used_up: str) -> None:
    for line in describe_mixture(samples):
        log.info(line)
    epochs = epochs_at(samples, job.train.max_steps * size)
    length = run_length(job, size, num_samples=samples.num_samples, epochs=epochs, used_up=used_up)
    log.info("length: %s", length)


def _describe_batches(job: JobConfig, geometry: ParallelDims) -> str:
    if geometry.pp > 1:
        size = job.distributed.pp_microbatch_size or 1
        return f"{geometry.pp_microbatches} microbatches of {size} through {geometry.pp} ranks"
    return f"{geometry.accumulation_steps} x {job.train.batch_size} per rank"


def _describe_optimizers(
    optimizers: Mapping[str, torch.optim.Optimizer], groups: Sequence[ParameterGroup]
) -> str:
    counts = {group.name: len(group.names) for group in groups}
    return ", ".join(
        f"{name} for {sum(counts.get(group['name'], 0) for group in optimizer.param_groups)} parameters"
        for name, optimizer in optimizers.items()
    )


def _peak_flops(device: torch.device) -> float | None:
    return peak_bf16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _context(
    job: JobConfig,
    world: DistributedContext,
    geometry: ParallelDims,
    record: RunRecord,
    dataset: AnyDataset,
    history: RunHistory,
) -> RunContext:
    return RunContext(
        run_id=record.run_id,
        attempt=record.attempt,
        layout=_layout(geometry, world),
        versions=versions(world.device) | plugin_versions(job),
        config_toml=job.to_toml(),
        tokenizer=_tokenizer(job, dataset),
        allow_changed_data=job.data.allow_changed,
        explain_data=compare_data,
        history=history,
    )


def _tokenizer(job: JobConfig, dataset: AnyDataset) -> dict[str, str]:
    """Return what an export needs to identify the tokenizer of the run, and its end token."""
    found: dict[str, str] = {}
    if job.checkpoint.load_path is not None:
        found["load_path"] = os.path.abspath(expand(job.checkpoint.load_path, key="checkpoint.load_path"))
    data = job.data
    if isinstance(dataset, MixtureDataset):  # all sources with an index have the same tokenizer
        name = next((name for name, source in dataset.sources.items() if source.index), data.sources[0].name)
        dataset, data = dataset.sources[name], data.by_source()[name]
    if isinstance(dataset, MapDataset) or dataset.index is None:  # they do not know their tokenizer
        return found
    found |= {"digest": dataset.index.tokenizer_digest, "separator_id": str(dataset.index.separator_id)}
    if dataset.index.text.bos_id is not None:
        found["bos_id"] = str(dataset.index.text.bos_id)
    # A prepared folder has the tokenizer with the chat template that was used.
    is_as_given = data.text is not None and data.chat_template is None
    path = tokenizer_path(data.tokenizer) if is_as_given else dataset.path / TOKENIZER
    return found if path is None or not path.is_file() else {**found, "path": os.path.abspath(path)}


def _layout(geometry: ParallelDims, world: DistributedContext) -> dict[str, int]:
    return {
        "num_ranks": world.num_ranks,
        "dp_replicate": geometry.dp_replicate,
        "dp_shard": geometry.dp_shard,
        "tp": geometry.tp,
        "pp": geometry.pp,
    }
