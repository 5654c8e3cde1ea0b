"""Restores a state from a folder of checkpoints, and writes the receipt."""

from __future__ import annotations

import contextlib
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
from kempnerforge.checkpoint.run.owner import ANYONE, Owner
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.checkpoint.state import rng_state
from kempnerforge.checkpoint.state.extra_state import PREFIX as EXTRA
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schedule_changes import learning_rate_change
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.config.toml_text import flatten
from kempnerforge.distributed.consensus import ControlGroup, mark_collective
from kempnerforge.errors import MismatchError, RunFolderError
from kempnerforge.goodput import crash_loop_guard
from kempnerforge.goodput.history import read_history

ALL_PARTS = ("model", "optimizer", "scheduler", "data", "rng")


class Restorer:
    """Fills a state from the newest sound step of a run, or from ``load_path``. Collective."""

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
        self._check_lease = check_lease
        self._owner = owner
        self.cleanup = StartCleanup(folder, attempt=context.attempt, owner=owner)
        """On the first rank: what could not be tidied up, and the steps that are passed over for it."""
        self._excluded_extras = frozenset(
            name.removeprefix(EXTRA) for name in config.exclude_from_loading if name.startswith(EXTRA)
        )

    @torch.inference_mode(False)  # what is made here outlives the mode that this is called in
    def restore(self, state: TrainState) -> Receipt:
        """What ``CheckpointManager.resume`` promises; the receipt is written."""
        self._control.run_on_rank0(self._prepare_folder)
        rejected: list[resume_report.Rejected] = []
        while True:
            found, rejected = self._control.run_on_rank0(lambda known=rejected: self._choose(list(known)))
            if found is None:
                result = self._begin(state)
                result.rejected = rejected
                break
            compatibility.refuse_other_model(found, self._context.config_toml)
            outcome = self._load(found, state, ALL_PARTS)
            if isinstance(outcome, LoadResult):
                result = self._apply(found, outcome, state, ALL_PARTS, "resume")
                result.rejected = rejected
                break
            rejected = self._control.run_on_rank0(
                lambda step=found.step, why=outcome, known=rejected: self._quarantine(step, why, known)
            )
        self._control.run_on_rank0(lambda: self._write(result))
        return result

    def _quarantine(
        self, step: int, why: str, rejected: list[resume_report.Rejected]
    ) -> list[resume_report.Rejected]:
        candidates.with_retries(self._check_lease, what=f"the lease in {self._run_dir}")
        return [*rejected, candidates.quarantine(self.cleanup, step, why)]

    def _prepare_folder(self) -> None:
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

    def _set_aside_late(self, cuts: Sequence[lineage.ResumePoint]) -> None:
        self.cleanup.set_aside_late(cuts, run_id=self._context.run_id, commits=self._commits)

    def _choose(
        self, rejected: list[resume_report.Rejected]
    ) -> tuple[Candidate | None, list[resume_report.Rejected]]:
        found = candidates.select(
            self._folder,
            rejected,
            self._suspects(),
            self.cleanup,
            owner=self._owner,
            in_the_way=lambda listing: known_steps.in_the_way(listing, self._run_dir),
        )
        if found is None:
            known_steps.require_known(self._folder, self._run_dir, self._owner)
        return found, rejected

    def _suspects(self) -> dict[int, str]:
        try:
            rollbacks = lineage.rollbacks(self._run_dir)
            return crash_loop_guard.suspects(read_history(self._run_dir, rollbacks=rollbacks))
        except OSError as error:
            self.cleanup.warn(f"which steps are suspect is not known: {error}")
            return {}

    def _write(self, result: Receipt) -> None:
        result.warnings = list(self.cleanup.warnings)
        try:
            result.write(self._run_dir)
        except OSError as error:
            raise RunFolderError(
                f"{self._run_dir / resume_report.RECEIPTS} cannot be written: {error}. It records which "
                "steps count. Fix this, then run the same command again"
            ) from error

    def _load(self, found: Candidate, state: TrainState, parts: Sequence[str]) -> LoadResult | str:
        return load_step.load_together(
            lambda: load_step.load(
                found,
                state,
                # Loops without the harness recorded no layout in early versions.
                same_layout=(found.manifest.provenance.layout or self._context.layout)
                == self._context.layout,
                rank=self._control.rank,
                num_ranks=self._control.num_ranks,
                parts=(*parts, "extra"),
                excluded=self._excluded_extras,
                context=self._context,
            ),
            self._control,
        )

    def _begin(self, state: TrainState) -> Receipt:
        if self._config.load_path is None:
            return Receipt(self._context.attempt)
        wanted = Path(self._config.load_path).expanduser()
        found = self._control.run_on_rank0(lambda: candidates.find_warm_start(wanted))
        parts = tuple(part for part in ALL_PARTS if part not in self._config.exclude_from_loading)
        if "model" in parts:
            compatibility.refuse_other_shapes(found, self._context.config_toml)
        with contextlib.ExitStack() as reading:
            # That run's retention must not delete what is being read.
            self._control.run_on_rank0(
                lambda: reading.enter_context(
                    read_locks.lock_for_reading(found.path, what="checkpoint.load_path")
                )
            )
            outcome = self._load(found, state, parts)
        if isinstance(outcome, str):
            raise mark_collective(candidates.damaged_warm_start(found, outcome))
        return self._apply(found, outcome, state, parts, "warm start")

    def _apply(
        self, found: Candidate, loaded: LoadResult, state: TrainState, parts: Sequence[str], source: str
    ) -> Receipt:
        self._hand_over(loaded, found)
        objects = loaded.reader.objects
        state.load_objects(objects, scheduler="scheduler" in parts, data="data" in parts)
        result = Receipt(self._context.attempt, source=source, step=state.step, path=str(found.path))
        captured_on = rng_state.captured_on(loaded.rng) if loaded.rng is not None else None
        if "rng" not in parts:
            result.rng = "left as the program has them"
        elif loaded.rng is not None and captured_on == state.device.type:
            rng_state.restore(loaded.rng, state.device)
            result.rng = "restored"
        else:
            rng_state.derive(state.seed, state.step, self._control.rank, state.device)
            if captured_on is not None:
                result.rng += f": captured on {captured_on}, now on {state.device.type}"
        is_exact = state.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        result.nondeterministic = not is_exact
        provenance = found.manifest.provenance
        if state.cursor:
            result.cursor = "restored" if "data" in parts else "start"
        extras = loaded.targets.extras
        result.extras = sorted(extras.loads.keys() - extras.empty)
        result.empty_extras = sorted(extras.empty)
        result.not_loaded = [part for part in ALL_PARTS if part not in parts]
        result.not_loaded += [EXTRA + name for name in loaded.targets.extras.excluded]
        if saved_by_run := bool(provenance.layout):  # imported weights have no layout that could differ
            result.layout_changes = resume_report.changes(provenance.layout, self._context.layout)
            result.version_changes = resume_report.changes(provenance.versions, self._context.versions)
        result.data_changes = loaded.data_changes
        result.size_bytes = found.manifest.size_bytes
        result.load_s = loaded.load_s
        if source == "resume":
            result.lost_steps, result.lost_committed = self._control.run_on_rank0(
                lambda: self._lost(state.step)
            )
        if found.config_toml and self._context.config_toml:
            before, now = tomli.loads(found.config_toml), tomli.loads(self._context.config_toml)
            if "model" not in now:  # a loop without the harness has no other sections
                before = {section: table for section, table in before.items() if section in now}
            if not saved_by_run:
                now = {section: table for section, table in now.items() if section in before}
            result.config_changes = resume_report.changes(flatten(before), flatten(now))
            change = learning_rate_change(before, now, state.step) if source == "resume" else None
            if change is not None:
                result.learning_rate = [change.before, change.now]
                result.keeps_schedule = change.to_keep
        if "data" in parts and not result.data_changes:
            self._prove_next_batch(found, loaded, state, result)
        return result

    def _lost(self, step: int) -> tuple[int, int]:
        """How many steps were done after ``step``, and the newest of them that is committed and set aside."""
        try:
            done = lineage.last_done_step(self._run_dir)
            aside = [found for found in paths.set_aside_steps(self._folder) if step < found <= done]
        except OSError as error:
            self.cleanup.warn(f"how many steps are done again is not known: {error}")
            return 0, 0
        return max(0, done - step), max(aside, default=0)

    def _commits(self) -> list[tuple[int, int]]:
        """Step and attempt of the commits in the ledger, as far as it can be read."""
        try:
            return [(one.step, one.attempt) for one in known_steps.commits(self._run_dir)]
        except OSError as error:
            self.cleanup.warn(f"which attempt committed which step is known from the steps alone: {error}")
            return []

    def _hand_over(self, loaded: LoadResult, found: Candidate) -> None:
        """Hand what was read to the program's objects. Their error on one rank is raised on all."""
        failure: MismatchError | None = None
        try:
            loaded.targets.apply()
        except Exception as error:  # noqa: BLE001 - the user's load_state_dict; all ranks must learn of it
            failure = MismatchError(
                f"{found.path} was read, and then refused by the program: {type(error).__name__}: {error}"
            )
            failure.__cause__ = error
        self._control.raise_on_any_error(failure)

    def _prove_next_batch(
        self, found: Candidate, loaded: LoadResult, state: TrainState, result: Receipt
    ) -> None:
        """Compare the batch that comes next with the one that came next when the step was saved."""
        stored, now = loaded.reader.objects["data"].get("next_digest"), state.next_digest()
        if stored is None or now is None or "train.global_batch_size" in result.config_changes:
            return
        if stored != now:
            raise mark_collective(
                MismatchError(
                    f"{found.path}: the batch after step {state.step} had digest {stored}, here it would "
                    f"have {now}: the data would not go on where they were"
                )
            )
        result.next_batch = "proved"
