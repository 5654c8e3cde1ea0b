"""When to stop trying: no progress over several faults, and checkpoints after which a run dies. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kempnerforge.goodput.blame import may_lie_in_state
from kempnerforge.goodput.history import AttemptHistory

HEALTHY_STEPS = 10
"""Finite steps after which the checkpoint that an attempt began from is trusted."""
DEATHS_FOR_SUSPICION = 2


def without_progress(history: Sequence[AttemptHistory], *, newest_committed: int) -> list[AttemptHistory]:
    """The attempts that ended in a fault of their own since the run last committed a new step, oldest first.

    A step is new when it is above all that were committed before, so that a run which was set back and
    commits the same steps again makes no progress. Attempts that ended otherwise neither
    count nor break the row.
    """
    row: list[AttemptHistory] = []
    highest = 0
    for place, one in enumerate(history):
        highest = max(highest, one.began_at or 0)
        following = [later.began_at for later in history[place + 1 :] if later.began_at is not None]
        # A commit whose event was lost with its node shows in where the next attempt began, or on the disk.
        seen = following[0] if following else newest_committed
        committed = max([seen, *(event["step"] for event in one.commits)])
        if one.acknowledged or committed > highest:
            row = []
        elif one.kind == "fault" and not one.is_own_loop:
            row.append(one)
        highest = max(highest, committed)
    return row


def suspects(history: Sequence[AttemptHistory]) -> dict[int, str]:
    """Steps that two attempts began from and then ended for a cause that may lie in them, and why.

    ``blame.may_lie_in_state`` decides. An attempt that began below such a step ends the suspicion: the step
    is another one when it comes again. Loops of users' own do not count: what ends them is most often their
    own code.
    """
    deaths: dict[int, list[AttemptHistory]] = {}
    for one in history:
        if one.began_at is None or one.is_own_loop:
            continue
        deaths = {step: died for step, died in deaths.items() if step <= one.began_at}
        blamed = may_lie_in_state(one.error_type, began_at=one.began_at, healthy=one.healthy)
        if blamed and not one.acknowledged:
            deaths.setdefault(one.began_at, []).append(one)
        elif one.healthy:
            deaths.pop(one.began_at, None)
    return {
        step: "; ".join(f"attempt {one.number}: {one.reason}" for one in died)
        for step, died in deaths.items()
        if len(died) >= DEATHS_FOR_SUSPICION
    }


def refusal(row: Sequence[AttemptHistory], *, limit: int, run_dir: str) -> str:
    """What a start that is refused says; empty when it may begin. ``limit`` 0 never refuses."""
    if not limit or len(row) < limit:
        return ""
    reasons = "".join(f"\n  attempt {one.number}: {one.reason}" for one in row)
    return (
        f"no progress: {len(row)} attempts ended in a fault of their own without a new committed step."
        f"{reasons}\nSee to the cause, then: kempnerforge unblock {run_dir}, and start the same command again"
    )
