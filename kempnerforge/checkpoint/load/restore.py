"""Restore a state from a folder of checkpoints, in order, and write the resume receipt."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tomli
import torch

from kempnerforge import fsio
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load import candidates, compatibility, load_step
from kempnerforge.checkpoint.load.candidates import Candidate
from kempnerforge.checkpoint.load.load_step import LoadResult
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.retention import read_locks
from kempnerforge.checkpoint.retention.start_cleanup import StartCleanup
from kempnerforge.checkpoint.run import known_steps, lineage, resume_report
from kempnerforge.checkpoint.run.lineage import ResumePoint
from kempnerforge.checkpoint.run.owner import ANYONE, Owner
from kempnerforge.checkpoint.run.resume_report import Receipt, Rejected
from kempnerforge.checkpoint.state import rng_state
from kempnerforge.checkpoint.state.extra_state import PREFIX as EXTRA
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.path_text import expand
from kempnerforge.config.schedule_changes import learning_rate_change
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.config.toml_text import flatten
from kempnerforge.distributed.consensus import ControlGroup, mark_collective
from kempnerforge.errors import MismatchError, RunFolderError
from kempnerforge.goodput.run_history import RunHistory

ALL_PARTS = ("model", "optimizer", "scheduler", "data", "rng")


class Restorer:
    """Fills a state from the newest sound step of a run, or from ``load_path``.

    Methods are collective, unless their docstring says "First rank only". Those are called on the
    first rank, and all ranks get what they return or raise.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        folder: Path,
        run_dir: Path,
        control: ControlGroup,
        context: RunContext,
        check_lease: Callable[[], None],
        owner: Owner = ANYONE,
    ) -> None:
        self._config = config
        self._folder = folder
        self._run_dir = run_dir
        self._control = control
        self._context = context
        self.history = context.history or RunHistory(run_dir)
        """The records of earlier attempts, which only the first rank reads."""
        self._check_lease = check_lease
        self._owner = owner
        self.cleanup = StartCleanup(folder, attempt=context.attempt, owner=owner)
        """On the first rank: what could not be cleaned up, and the steps that are skipped for that reason."""
        self._excluded_extras = frozenset(
            name.removeprefix(EXTRA) for name in config.exclude_from_loading if name.startswith(EXTRA)
        )

    @torch.inference_mode(False)  # the tensors made here outlive an inference mode of the caller
    def restore(self, state: TrainState) -> Receipt:
        """Restore ``state`` as ``CheckpointManager.resume`` documents, and write the receipt."""
        self._control.run_on_rank0(self._prepare_folder)
        rejected: list[Rejected] = []
        while True:
            candidate, rejected = self._control.run_on_rank0(functools.partial(self._choose, rejected))
            if candidate is None:
                receipt = self._begin(state)
                break
            compatibility.refuse_other_model(candidate, self._context.config_toml)
            outcome = self._load(candidate, state, ALL_PARTS)
            if isinstance(outcome, LoadResult):
                receipt = self._apply(candidate, outcome, state, ALL_PARTS, "resume")
                break
            rejected = self._control.run_on_rank0(
                functools.partial(self._quarantine, candidate.step, outcome, rejected)
            )
        receipt.rejected = rejected
        self._control.run_on_rank0(lambda: self._write(receipt))
        return receipt

    # -- choose ------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        """Create the folder, remove leftovers, set aside steps off the timeline. First rank only."""
        candidates.with_retries(self._check_lease, what=f"the lease in {self._run_dir}")
        try:
            fsio.make_folder(self._folder)
        except OSError as error:
            raise RunFolderError(f"{self._folder} cannot be used for checkpoints: {error}") from error
        self.cleanup.remove_leftovers()
        cuts = candidates.with_retries(
            lambda: lineage.cuts(self._run_dir), what=f"the timeline of {self._run_dir}"
        )
        for delay_s in (*candidates.RETRY_DELAYS_S, None):
            candidates.with_retries(lambda: self._set_aside_late(cuts), what=str(self._folder))
            if not self.cleanup.unreadable or delay_s is None:
                break
            time.sleep(delay_s)

    def _set_aside_late(self, cuts: Sequence[ResumePoint]) -> None:
        self.cleanup.set_aside_late(cuts, run_id=self._context.run_id, commits=self._commits)

    def _choose(self, rejected: Sequence[Rejected]) -> tuple[Candidate | None, list[Rejected]]:
        """Return the step to resume from, and all steps rejected so far. First rank only."""
        rejected = list(rejected)
        candidate = candidates.select(
            self._folder,
            rejected,
            self._suspects(),
            self.cleanup,
            owner=self._owner,
            run_dir=self._run_dir,
        )
        if candidate is None:
            known_steps.require_known(self._folder, self._run_dir, self._owner, history=self.history)
        return candidate, rejected

    def _quarantine(self, step: int, why: str, rejected: Sequence[Rejected]) -> list[Rejected]:
        """Quarantine a step that some rank found damaged. First rank only."""
        candidates.with_retries(self._check_lease, what=f"the lease in {self._run_dir}")
        return [*rejected, candidates.quarantine(self.cleanup, step, why)]

    # -- read --------------------------------------------------------------------------------------------

    def _load(self, candidate: Candidate, state: TrainState, parts: Sequence[str]) -> LoadResult | str:
        # Early versions recorded no layout for users' own loops.
        saved_layout = candidate.manifest.provenance.layout or self._context.layout
        return load_step.load_together(
            lambda: load_step.load(
                candidate,
                state,
                same_layout=saved_layout == self._context.layout,
                rank=self._control.rank,
                num_ranks=self._control.num_ranks,
                parts=(*parts, "extra"),
                excluded=self._excluded_extras,
                context=self._context,
            ),
            self._control,
        )

    def _begin(self, state: TrainState) -> Receipt:
        """Begin at step 0, or from ``load_path`` if it is set."""
        if self._config.load_path is None:
            return Receipt(self._context.attempt)
        wanted = expand(self._config.load_path, key="checkpoint.load_path")
        candidate = self._control.run_on_rank0(lambda: candidates.find_warm_start(wanted))
        parts = tuple(part for part in ALL_PARTS if part not in self._config.exclude_from_loading)
        if "model" in parts:
            compatibility.refuse_other_shapes(candidate, self._context.config_toml)
        with contextlib.ExitStack() as reading:
            # The other run's retention must not delete the step meanwhile.
            self._control.run_on_rank0(
                lambda: reading.enter_context(
                    read_locks.lock_for_reading(candidate.path, what="checkpoint.load_path")
                )
            )
            outcome = self._load(candidate, state, parts)
        if isinstance(outcome, str):
            raise mark_collective(candidates.damaged_warm_start(outcome))
        return self._apply(candidate, outcome, state, parts, "warm start")

    # -- apply -------------------------------------------------------------------------------------------

    def _apply(
        self, candidate: Candidate, loaded: LoadResult, state: TrainState, parts: Sequence[str], source: str
    ) -> Receipt:
        """Apply what was read to ``state``. Return the receipt, which lists every difference."""
        self._hand_over(loaded, candidate)
        state.load_objects(loaded.reader.objects, scheduler="scheduler" in parts, data="data" in parts)
        receipt = Receipt(self._context.attempt, source=source, step=state.step, path=str(candidate.path))
        self._restore_generators(loaded, state, parts, receipt)
        is_exact = state.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        receipt.nondeterministic = not is_exact
        if state.cursor:
            receipt.cursor = "restored" if "data" in parts else "start"
        extras = loaded.targets.extras
        receipt.extras = sorted(extras.loads.keys() - extras.empty)
        receipt.empty_extras = sorted(extras.empty)
        receipt.not_loaded = [part for part in ALL_PARTS if part not in parts]
        receipt.not_loaded += [EXTRA + name for name in extras.excluded]
        provenance = candidate.manifest.provenance
        if provenance.layout:  # imported weights have none
            receipt.layout_changes = resume_report.changes(provenance.layout, self._context.layout)
            receipt.version_changes = resume_report.changes(provenance.versions, self._context.versions)
        receipt.data_changes = loaded.data_changes
        receipt.data_additions = loaded.data_additions
        receipt.size_bytes = candidate.manifest.size_bytes
        receipt.load_s = loaded.load_s
        if source == "resume":
            receipt.lost_steps, receipt.lost_committed = self._control.run_on_rank0(
                lambda: self._lost(state.step)
            )
        self._compare_configs(candidate, state, receipt)
        if "data" in parts and not receipt.data_changes:
            self._prove_next_batch(candidate, loaded, state, receipt)
        return receipt

    def _hand_over(self, loaded: LoadResult, candidate: Candidate) -> None:
        """Call ``load_state_dict`` of the program's objects. An error on one rank is raised on all ranks."""
        failure: MismatchError | None = None
        try:
            loaded.targets.apply()
        except Exception as error:  # noqa: BLE001 - the user's load_state_dict; all ranks must learn of it
            failure = MismatchError(
                f"{candidate.path} was read, but the program refused it: {type(error).__name__}: {error}"
            )
            failure.__cause__ = error
        self._control.raise_on_any_error(failure)

    def _restore_generators(
        self, loaded: LoadResult, state: TrainState, parts: Sequence[str], receipt: Receipt
    ) -> None:
        """Restore this rank's random number generators, or derive them from (seed, step, rank)."""
        captured_on = rng_state.captured_on(loaded.rng) if loaded.rng is not None else None
        if "rng" not in parts:
            receipt.rng = "left as the program has them"
        elif loaded.rng is not None and captured_on == state.device.type:
            rng_state.restore(loaded.rng, state.device)
            receipt.rng = "restored"
        else:
            stream = self._control.rank if state.rng_stream is None else state.rng_stream
            rng_state.derive(state.seed, state.step, stream, state.device)
            if captured_on is not None:
                receipt.rng += f": captured on {captured_on}, now on {state.device.type}"

    def _compare_configs(self, candidate: Candidate, state: TrainState, receipt: Receipt) -> None:
        """Record how the config differs from the one that the step was saved with."""
        if not (candidate.config_toml and self._context.config_toml):
            return
        before, now = tomli.loads(candidate.config_toml), tomli.loads(self._context.config_toml)
        if "model" not in now:  # a user's own loop has only [checkpoint]
            before = {section: table for section, table in before.items() if section in now}
        if not candidate.manifest.provenance.layout:  # imported weights have only some sections
            now = {section: table for section, table in now.items() if section in before}
        receipt.config_changes = resume_report.changes(flatten(before), flatten(now))
        change = learning_rate_change(before, now, state.step) if receipt.source == "resume" else None
        if change is not None:
            receipt.learning_rate = [change.before, change.now]
            receipt.keeps_schedule = change.to_keep

    def _prove_next_batch(
        self, candidate: Candidate, loaded: LoadResult, state: TrainState, receipt: Receipt
    ) -> None:
        """Compare the next batch with the batch that was next when the step was saved."""
        stored, now = loaded.reader.objects["data"].get("next_digest"), state.next_digest()
        if stored is None or now is None or "train.global_batch_size" in receipt.config_changes:
            return
        if stored != now and receipt.data_additions:  # they may begin with this very batch
            return
        if stored != now:
            raise mark_collective(
                MismatchError(
                    f"{candidate.path}: the batch after step {state.step} had digest {stored}, but here it "
                    f"has {now}: the data would not continue where it stopped"
                )
            )
        receipt.next_batch = "proved"

    def _write(self, receipt: Receipt) -> None:
        """Append the receipt. First rank only."""
        receipt.warnings = list(self.cleanup.warnings)
        try:
            receipt.write(self._run_dir)
        except OSError as error:
            raise RunFolderError(
                f"{self._run_dir / resume_report.RECEIPTS} cannot be written: {error}. It records which "
                "steps count. Fix this, then run the same command again"
            ) from error

    # -- the run's records, on the first rank ------------------------------------------------------------

    def _suspects(self) -> dict[int, str]:
        """Return the steps from which two attempts resumed and failed, with reasons."""
        try:
            return self.history.suspects(lineage.rollbacks(self._run_dir))
        except OSError as error:
            self.cleanup.warn(f"suspect steps are unknown: {error}")
            return {}

    def _lost(self, step: int) -> tuple[int, int]:
        """Return how many steps after ``step`` had been done, and the newest of them that is set aside."""
        try:
            done = self.history.last_done_step(lineage.rollbacks(self._run_dir))
            aside = [number for number in paths.set_aside_steps(self._folder) if step < number <= done]
        except OSError as error:
            self.cleanup.warn(f"the number of repeated steps is unknown: {error}")
            return 0, 0
        return max(0, done - step), max(aside, default=0)

    def _commits(self) -> list[tuple[int, int]]:
        """Return step and attempt of the commits in the ledger, as far as it can be read."""
        try:
            return [(commit.step, commit.attempt) for commit in known_steps.commits(self.history.events())]
        except OSError as error:
            self.cleanup.warn(f"the attempt of each commit is known only from the steps: {error}")
            return []
