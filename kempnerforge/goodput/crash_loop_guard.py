"""Detect crash loops: repeated faults without progress, and checkpoints after which a run fails."""

from __future__ import annotations

from collections.abc import Sequence

from kempnerforge.goodput.blame import may_lie_in_state
from kempnerforge.goodput.history import AttemptHistory

HEALTHY_STEPS = 10
"""Number of finite steps after which the checkpoint that an attempt started from is trusted."""
DEATHS_FOR_SUSPICION = 2


def without_progress(history: Sequence[AttemptHistory], *, newest_committed: int) -> list[AttemptHistory]:
    """Return the attempts that failed through their own fault since the last new commit, oldest first.

    A step is new if it is above all committed steps before it. A run that was rolled back and
    commits the same steps again makes no progress. Attempts that ended in another way neither count
    nor reset the count.
    """
    row: list[AttemptHistory] = []
    highest = 0
    for index, attempt in enumerate(history):
        highest = max(highest, attempt.began_at or 0)
        following = [later.began_at for later in history[index + 1 :] if later.began_at is not None]
        # The event of a commit may be lost with its node. The next start, or the disk, shows the
        # step.
        seen = following[0] if following else newest_committed
        committed = max([seen, *(event["step"] for event in attempt.commits)])
        if attempt.acknowledged or committed > highest:
            row = []
        elif attempt.kind == "fault" and not attempt.is_own_loop:
            row.append(attempt)
        highest = max(highest, committed)
    return row


def suspects(history: Sequence[AttemptHistory]) -> dict[int, str]:
    """Return steps that may have caused the end of two attempts that started from them, and the reasons.

    ``blame.may_lie_in_state`` decides for each end. An attempt that starts below a suspect step
    clears the suspicion, because the step will be computed again. Users' own loops are not
    considered, because most of their failures come from their own code.
    """
    deaths: dict[int, list[AttemptHistory]] = {}
    for attempt in history:
        if attempt.began_at is None or attempt.is_own_loop:
            continue
        deaths = {step: died for step, died in deaths.items() if step <= attempt.began_at}
        blamed = may_lie_in_state(attempt.error_type, began_at=attempt.began_at, healthy=attempt.healthy)
        if blamed and not attempt.acknowledged:
            deaths.setdefault(attempt.began_at, []).append(attempt)
        elif attempt.healthy:
            deaths.pop(attempt.began_at, None)
    return {
        step: "; ".join(f"attempt {attempt.number}: {attempt.reason}" for attempt in died)
        for step, died in deaths.items()
        if len(died) >= DEATHS_FOR_SUSPICION
    }


def refusal(row: Sequence[AttemptHistory], *, limit: int, run_dir: str) -> str:
    """Return the message for a refused start; empty if the run may start, as always with ``limit`` 0."""
    if not limit or len(row) < limit:
        return ""
    reasons = "".join(f"\n  attempt {attempt.number}: {attempt.reason}" for attempt in row)
    return (
        f"no progress: {len(row)} attempts failed through their own fault without a new committed step."
        f"{reasons}\nFix the cause, then run kempnerforge unblock {run_dir} and start the same command again"
    )
