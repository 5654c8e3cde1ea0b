"""Which ends of an attempt may be the fault of the checkpoint that it began from. Pure."""

from __future__ import annotations

CAUSES_IN_STATE = ("NonFiniteError", "DamagedCheckpointError", "MismatchError")
"""Classes of errors whose cause may lie in the state that was loaded.

Everything else has its cause elsewhere, and another checkpoint would not help: memory (host or CUDA),
devices, networks, hangs, signals, kills, and the code of the user.
"""


def may_lie_in_state(error_type: str, *, began_at: int | None, healthy: bool) -> bool:
    """Return whether an attempt ended for a cause that may lie in the step that it began from.

    ``error_type``: class of the error that ended it; empty if it ended without one. ``began_at``: the step
    that it resumed from; None if it did not get that far. ``healthy``: whether it trained for long enough
    since for that step to be trusted.
    """
    return error_type in CAUSES_IN_STATE and bool(began_at) and not healthy
